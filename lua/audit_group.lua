-- Makes the consumer group of an audit stream, and the stream where there is none.
--
-- KEYS    1 the stream
-- ARGV    1 the consumer group
-- reply   1, or 0 if the group was there
--
-- A script, since XGROUP CREATE alone is refused by a Redis that is full, which only this group's workers can empty. Scripts are let go
-- on behind a write that takes no memory.

redis.call('XDEL', KEYS[1], '0-1')
-- From the first entry on: whatever is there is not stored, or is known to be once it is tried.
local made = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
if not made.err then return 1 end
if string.find(made.err, 'BUSYGROUP', 1, true) then return 0 end
return made
