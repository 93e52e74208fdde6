-- A process gives a sign of life, and learns how many do.
--
-- KEYS    1 the processes: a sorted set of names by when they are given up (ms since the Unix epoch)
-- ARGV    1 the process's name
--         2 ms for which the sign holds
-- reply   how many live, this one among them
--
-- Atomic, so that whoever counts has left out the dead. One key, one slot.

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
-- From before a clock was set back. By less, those who live are to stay.
redis.call('ZREMRANGEBYSCORE', KEYS[1], now + 2 * ARGV[2], '+inf')
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
redis.call('PEXPIRE', KEYS[1], 60000)
return redis.call('ZCARD', KEYS[1])
