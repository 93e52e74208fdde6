-- Says who sweeps the sessions: whoever asks first, until it has not asked for a while.
--
-- KEYS    1 who sweeps
-- ARGV    1 who asks
--         2 how long this holds, in ms
-- reply   1: the asker sweeps; 0: another does
--
-- Atomic, since between a look and a write another could come.

local who = redis.call('GET', KEYS[1])
if who and who ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
