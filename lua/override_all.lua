-- All overrides of limits, which are kept for as long as someone looks.
--
-- KEYS    1 the overrides: as in override_put.lua
-- ARGV    1 ms for which they are kept unless someone looks again
--         2 the name of their number
-- reply   the hash, names and values in turn
--
-- One key, one slot. Overrides of a version that had no number get one.

if redis.call('PEXPIRE', KEYS[1], ARGV[1]) == 1 then
  redis.call('HSETNX', KEYS[1], ARGV[2], 1)
end
return redis.call('HGETALL', KEYS[1])
