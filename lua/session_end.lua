-- Ends one session of a user, or all of them, and tells all weirs.
--
-- KEYS    1 the user's sessions, as in session_create.lua
-- ARGV    1 the channel where ended sessions are told
--         2 how the message begins
--         3 what the session is called; empty: all of the user
-- reply   what those that were ended are called
--
-- Atomic, so that what is told is what is ended, and none that begins at the same time is missed by half.

local key, ended = KEYS[1], {}
if ARGV[3] ~= '' then
  if redis.call('HDEL', key, ARGV[3]) == 1 then
    ended[1] = ARGV[3]
    -- A name without sessions is not kept.
    if redis.call('HLEN', key) == 1 then redis.call('DEL', key) end
  end
else
  for _, field in ipairs(redis.call('HKEYS', key)) do
    if field ~= 'u' then ended[#ended + 1] = field end
  end
  redis.call('DEL', key)
end
-- A message of bounded length, whatever a user has.
for first = 1, #ended, 500 do
  local last = math.min(first + 499, #ended)
  redis.call('PUBLISH', ARGV[1], ARGV[2] .. ' ' .. table.concat(ended, ' ', first, last))
end
return ended
