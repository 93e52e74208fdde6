-- Finds a session, and writes down that it was used.
--
-- KEYS    1 the user's sessions, as in session_create.lua
-- ARGV    1 what the session is called
--         2 a use is written down when the last one written is older than this, in ms; -1: this is not a use
--         3 how long ago the use was, in ms
--         4 its absolute timeout at most, and 5 its idle timeout, in ms: it may have begun with longer ones
-- reply   nothing: there is no such session, or it is over; or the user's name, then in ms: since it was created, until its
--         absolute timeout, its idle timeout, since the last use that is written down; then its claims as JSON, or empty
--
-- Times are told as durations, so that no other clock has to agree. Atomic, so that a use is not written to a session that has ended.

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local key, touch = KEYS[1], tonumber(ARGV[2])

local record = redis.call('HGET', key, ARGV[1])
if not record then return {} end
local created, absolute, seen, idle, claims = string.match(record, '^(%d+) (%d+) (%d+) (%d+) ?(.*)$')
created, seen = tonumber(created), tonumber(seen)
absolute, idle = math.min(absolute, ARGV[4]), math.min(idle, ARGV[5])
local age = now - created

-- A use counts from when it was, and only if the session was not over by then.
local used = seen
if touch >= 0 then
  used = age - tonumber(ARGV[3])
  if used < seen or used >= seen + idle then used = seen end
end
if age >= absolute or age >= used + idle then
  redis.call('HDEL', key, ARGV[1])
  -- A name without sessions is not kept.
  if redis.call('HLEN', key) == 1 then redis.call('DEL', key) end
  return {}
end

local function write()
  local text = string.format('%.0f %.0f %.0f %.0f', created, absolute, used, idle)
  if claims ~= '' then text = text .. ' ' .. claims end
  -- A server that takes no writes, being full, still tells what it has.
  local written = redis.pcall('HSET', key, ARGV[1], text)
  return not (type(written) == 'table' and written.err)
end

if used > seen and used - seen >= touch and write() then
  seen = used
  local life = math.min(absolute, seen + idle) - age
  if redis.call('PTTL', key) < life then redis.call('PEXPIRE', key, string.format('%.0f', life)) end
  -- Some of the user's others are looked at, so that one in use does not keep those that are over.
  local some = redis.call('HRANDFIELD', key, 10, 'WITHVALUES')
  for i = 1, #some, 2 do
    if some[i] ~= 'u' then
      local began, ends, last, rest = string.match(some[i + 1], '^(%d+) (%d+) (%d+) (%d+)')
      if now >= began + math.min(ends, last + rest) then redis.call('HDEL', key, some[i]) end
    end
  end
end
return {
  redis.call('HGET', key, 'u'), math.max(0, age), absolute - age, idle, math.max(0, age - seen), claims,
}
