-- Tells a Redis that lost overrides of limits those that a process knows.
--
-- KEYS    1 the overrides: as in override_put.lua
-- ARGV    1 ms for which they are kept unless someone looks at them
--         2 the name of their number, 3 their number as the process knows it
--         4 the channel on which it is told that they have changed
--         5 and on: which one, and the limit in words, in turn
-- reply   the hash, names and values in turn
--
-- One key, one slot. Atomic, so that of several processes one tells it. What was set since the loss stays as it is.

if tonumber(redis.call('HGET', KEYS[1], ARGV[2]) or 0) < tonumber(ARGV[3]) then
  for i = 5, #ARGV, 2 do redis.call('HSETNX', KEYS[1], ARGV[i], ARGV[i + 1]) end
  redis.call('HSET', KEYS[1], ARGV[2], ARGV[3])
  redis.call('PUBLISH', ARGV[4], 'changed')
end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return redis.call('HGETALL', KEYS[1])
