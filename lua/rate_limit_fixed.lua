-- Fixed windows of one limit for one key: debits tokens of all its rules, or of none. So for each of several keys, as
-- rate_limit_bucket.lua does, by the same end.
--
-- KEYS    one window a rule; those of one key of a limit in one slot by their hash tag
-- ARGV    doubles as in rate_limit_bucket.lua, then for each rule: the limit; the start, the end and the next end (µs since the Unix
--         epoch) of the window that the caller thinks it is in
-- reply   as rate_limit_bucket.lua, the last of each rule being µs until the window ends; or -1 and now, when the caller's clock
--         is so far off that none of its windows is the present one: ask again
--
-- A window is its end (µs) and what it has granted, `END:USED`. The calendar is the caller's, the time this server's. A server whose
-- clock is set back stays in the window that it was in, so that none is opened twice.

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local pack, unpack = struct.pack, struct.unpack

-- Bytes of ARGV for each rule.
local OF_RULE = 32

-- What is asked of the rules whose keys stand behind so many others.
local function grant(asked, rules, behind)
  local first, need, want, share, back, taken_at = unpack('<dddddd', asked)

  local ends, used, held, free = {}, {}, {}, math.huge
  for i = 1, rules do
    local limit, from, this, following = unpack('<dddd', asked, 17 + 32 * i)
    local stored = redis.call('GET', KEYS[behind + i])
    if stored then
      local stored_end, stored_used = string.match(stored, '^(%d+):(%d+)$')
      if now < stored_end + 0 then
        ends[i], used[i] = stored_end + 0, stored_used + 0
        held[i] = used[i]
      end
    end
    if not ends[i] then
      if now < from or now >= following then return pack('<dd', -1, now) end
      ends[i], used[i] = now < this and this or following, 0
    end
    -- Tokens of a window before this one were never of this one.
    if ends[i] == following then from = this elseif ends[i] ~= this then from = math.huge end
    if back > 0 and taken_at >= from then used[i] = math.max(0, used[i] - back) end
    free = math.min(free, limit - used[i])
  end

  free = math.max(free, 0)
  local granted = 0
  if free >= first then
    granted = math.min(free, math.max(need, math.min(want, math.floor(free * share))))
  end

  -- Who waits behind the last tokens is to know when there are more.
  local lacking = 0
  if granted < need then lacking = granted == 0 and first > 1 and first or 1 end

  local reply = pack('<dd', granted, now)
  for i = 1, rules do
    local limit = unpack('<d', asked, 17 + 32 * i)
    local left = math.ceil(ends[i] - now)
    used[i] = used[i] + granted
    local wait = 0
    if lacking > limit then wait = -1 elseif limit - used[i] < lacking then wait = left end
    if used[i] ~= (held[i] or 0) then
      redis.call('SET', KEYS[behind + i], string.format('%.0f:%.0f', ends[i], used[i]), 'PX', math.ceil(left / 1000) + 1)
    end
    local remaining = math.max(0, limit - used[i])
    reply = reply .. pack('<dddd', remaining, left, wait, left)
  end
  return reply
end
