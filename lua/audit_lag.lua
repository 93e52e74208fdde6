-- How far the storing of an audit stream is behind.
--
-- KEYS    1 the stream
--         2 its dead letters, of the same slot
-- ARGV    1 the consumer group
-- reply   entries, those given to a worker and not stored, the oldest one's age in ms, dead letters
--
-- A script, so that the oldest entry's bytes do not travel, and its age is by the clock that gave it its id.

local entries = redis.call('XLEN', KEYS[1])
local dead = redis.call('XLEN', KEYS[2])
if entries == 0 then return { 0, 0, 0, dead } end
local oldest = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1][1]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local age = now - tonumber(string.match(oldest, '^%d+'))
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1])
-- Without the group none are.
pending = pending.err and 0 or pending[1]
return { entries, pending, math.max(age, 0), dead }
