-- Says which entries a stream no longer has: they were stored, or lost with the node that took them.
--
-- KEYS    1 the stream
-- ARGV    1… ids of entries
-- reply   the positions in ARGV, from 1, of those that are not there
--
-- Only reads; a script, so that many are asked about in one call.

local missing = {}
for at, id in ipairs(ARGV) do
  if #redis.call('XRANGE', KEYS[1], id, id) == 0 then missing[#missing + 1] = at end
end
return missing
