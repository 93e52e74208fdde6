-- Puts a dead letter back into its audit stream, to be tried anew.
--
-- KEYS    1 the dead letters
--         2 the stream, of the same slot
-- ARGV    1 the dead letter's id
-- reply   1, or 0 if it was not there
--
-- Atomic, since a letter must be in one of the two places, whoever dies meanwhile.

local letter = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1]
if not letter then return 0 end
local fields = letter[2]
local batch = ''
for i = 1, #fields, 2 do
  if fields[i] == 'b' then batch = fields[i + 1] end
end
redis.call('XADD', KEYS[2], '*', 'b', batch)
redis.call('XDEL', KEYS[1], ARGV[1])
return 1
