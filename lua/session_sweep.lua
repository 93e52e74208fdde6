-- Removes what is over of a part of a user's sessions, and counts what lives.
--
-- KEYS    1 the user's sessions, as in session_create.lua
-- ARGV    1 where to go on, as the last reply said; 0: at the start
--         2 about how many
-- reply   where the next part begins (0: this was the last), how many of the part live, how many were removed
--
-- No one is told: who remembers a session knows when it is over. Atomic, so that a use that is written down meanwhile counts.

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local key, live, removed = KEYS[1], 0, 0
local part = redis.call('HSCAN', key, ARGV[1], 'COUNT', ARGV[2])
for i = 1, #part[2], 2 do
  if part[2][i] ~= 'u' then
    local created, absolute, seen, idle = string.match(part[2][i + 1], '^(%d+) (%d+) (%d+) (%d+)')
    if now >= created + math.min(absolute, seen + idle) then
      removed = removed + redis.call('HDEL', key, part[2][i])
    else
      live = live + 1
    end
  end
end
-- A name without sessions is not kept.
if removed > 0 and redis.call('HLEN', key) == 1 then redis.call('DEL', key) end
return { part[1], live, removed }
