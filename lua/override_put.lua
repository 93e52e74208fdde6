-- Sets the override of a limit for one key, or takes it back, and tells all processes.
--
-- KEYS    1 the overrides: a hash of `["LIMIT","KEY"]` to the limit in words, and of ARGV 5 to how often they have changed
-- ARGV    1 which one
--         2 the limit in words; empty: it is taken back
--         3 ms for which the overrides are kept unless someone looks at them
--         4 the channel on which it is told that they have changed
--         5 the name of their number
-- reply   1 if there was such an override, else 0
--
-- Atomic, so that whoever hears of it finds it. One key, one slot. The number stays when no override does: by it a Redis that lost
-- them is told from one that has none.

local before = redis.call('HEXISTS', KEYS[1], ARGV[1])
if ARGV[2] == '' then
  redis.call('HDEL', KEYS[1], ARGV[1])
else
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
end
redis.call('HINCRBY', KEYS[1], ARGV[5], 1)
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PUBLISH', ARGV[4], 'changed')
return before
