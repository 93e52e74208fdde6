-- An operator forces a shared circuit breaker open or closed, or sets it back.
--
-- KEYS    1 the state, as in breaker_sync.lua
--         2 those that doubt the upstream
--         3 the probes' slots
-- ARGV    1 the state: forced_open, forced_closed or closed
--         2 the generation that the process knows
--         3 the channel of transitions
--         4 the breaker's tag
-- reply   the generation from now on
--
-- One hash tag. Atomic, so that no report in between is counted to the state that this ends. The window is begun anew by its
-- number.

local DAY = 86400000
local field = redis.call('HMGET', KEYS[1], 'g', 'w', 'p')
local generation = math.max(tonumber(field[1] or 0), tonumber(ARGV[2])) + 1
local whole = function(value) return string.format('%.0f', value) end
local window, last = tonumber(field[2] or 0) + 1, tonumber(field[3] or 0)
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
redis.call('HSET', KEYS[1], 'g', whole(generation), 's', ARGV[1], 'p', whole(last), 'w', whole(window))
redis.call('PEXPIRE', KEYS[1], 30 * DAY)
redis.call('PUBLISH', ARGV[3], string.format('%s %.0f %s 0', ARGV[4], generation, ARGV[1]))
return generation
