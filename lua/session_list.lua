-- A part of a user's live sessions.
--
-- KEYS    1 the user's sessions, as in session_create.lua
-- ARGV    1 where to go on, as the last reply said; 0: at the start
--         2 about how many
-- reply   where the next part begins (0: this was the last), the user's name, then for each session: what it is called and, as in
--         session_find.lua, since it was created, until its absolute timeout, its idle timeout, since its last use, its claims
--
-- Nothing is changed.

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local part = redis.call('HSCAN', KEYS[1], ARGV[1], 'COUNT', ARGV[2])
local reply = { part[1], redis.call('HGET', KEYS[1], 'u') or '' }
for i = 1, #part[2], 2 do
  if part[2][i] ~= 'u' then
    local created, absolute, seen, idle, claims = string.match(part[2][i + 1], '^(%d+) (%d+) (%d+) (%d+) ?(.*)$')
    local age = now - created
    absolute, seen, idle = tonumber(absolute), tonumber(seen), tonumber(idle)
    if age < absolute and age < seen + idle then
      for _, value in ipairs({ part[2][i], math.max(0, age), absolute - age, idle, math.max(0, age - seen), claims }) do
        reply[#reply + 1] = value
      end
    end
  end
end
return reply
