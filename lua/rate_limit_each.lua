-- The end of rate_limit_bucket.lua, rate_limit_fixed.lua and rate_limit_sliding.lua: has `grant` answer each of ARGV, by its own KEYS.
--
-- One whose keys cannot be read or written spoils no other: those ahead of it are debited by then, and are to hear of it.

local replies, behind = {}, 0
while behind < #KEYS do
  local asked = ARGV[#replies + 1]
  local rules = (#asked - 48) / OF_RULE
  local ran, reply = pcall(grant, asked, rules, behind)
  if not ran then
    local why = type(reply) == 'table' and reply.err or reply
    -- Of this key alone, or of what writes. All else is the server's answer to everyone.
    if not (string.find(why, 'WRONGTYPE') or string.find(why, 'OOM ')) then error(reply, 0) end
    reply = { why }
  end
  replies[#replies + 1] = reply
  behind = behind + rules
end
return replies
