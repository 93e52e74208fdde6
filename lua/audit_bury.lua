-- Moves an entry of an audit stream that cannot be stored to the dead letters, with the reason.
--
-- KEYS    1 the stream
--         2 the dead letters, of the same slot
-- ARGV    1 the consumer group
--         2 the entry's id
--         3 the reason
-- reply   1, or 0 if the entry was not there any more
--
-- Atomic, since an entry must be in one of the two places, whoever dies meanwhile. A dead letter has the entry's own fields (`b`: the
-- batch) behind `reason`, `id` and `at`, in ms since the Unix epoch.

redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
local entry = redis.call('XRANGE', KEYS[1], ARGV[2], ARGV[2])[1]
if not entry then return 0 end
local time = redis.call('TIME')
local at = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
-- An entry of someone else may have more fields than a call takes arguments.
local fields = entry[2]
redis.call('XADD', KEYS[2], '*', 'reason', ARGV[3], 'id', ARGV[2], 'at', at, unpack(fields, 1, math.min(#fields, 1000)))
redis.call('XDEL', KEYS[1], ARGV[2])
return 1
