-- Sliding windows of one limit for one key: debits tokens of all its rules, or of none. So for each of several keys, as
-- rate_limit_bucket.lua does, by the same end.
--
-- KEYS    one window a rule; those of one key of a limit in one slot by their hash tag
-- ARGV    doubles as in rate_limit_bucket.lua, then for each rule: the limit, and the length of its window in µs
-- reply   as rate_limit_bucket.lua
--
-- A window is its number since the Unix epoch, what it has granted and what the one before it had: `NUMBER:USED:BEFORE`. What the one
-- before had counts by the share of it that the sliding window still covers, as if it had been even. A server whose clock is
-- set back into the window before stays at the start of the one that it was in. Where it is set back further, what both had was used
-- in the present one: else none would come back until the clock has caught up.

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local pack, unpack = struct.pack, struct.unpack

-- Bytes of ARGV for each rule.
local OF_RULE = 16

-- What is asked of the rules whose keys stand behind so many others.
local function grant(asked, rules, behind)
  local first, need, want, share, back, taken_at = unpack('<dddddd', asked)

  local number, used, before, into, held, free = { 0 }, { 0 }, { 0 }, { 0 }, { 0 }, math.huge
  local moved = { false }
  for i = 1, rules do
    local limit, length = unpack('<dd', asked, 33 + 16 * i)
    number[i], into[i] = math.floor(now / length), now % length
    used[i], before[i] = 0, 0
    held[i] = redis.call('GET', KEYS[behind + i])
    if held[i] then
      local n, u, b = string.match(held[i], '^(%d+):(%d+):(%d+)$')
      n, u, b = n + 0, u + 0, b + 0
      if n > number[i] + 1 then
        used[i], moved[i] = math.max(u, math.min(limit, u + b)), true
      elseif n >= number[i] then
        if n > number[i] then number[i], into[i] = n, 0 end
        used[i], before[i] = u, b
      elseif n == number[i] - 1 then
        before[i] = u
      end
    end
    if back > 0 then
      local taken_in = math.floor(taken_at / length)
      if taken_in == number[i] then
        used[i] = math.max(0, used[i] - back)
      elseif taken_in == number[i] - 1 then
        before[i] = math.max(0, before[i] - back)
      end
    end
    local estimate = before[i] * (length - into[i]) / length + used[i]
    free = math.min(free, math.floor(limit - estimate + 0.000001))
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
    local limit, length = unpack('<dd', asked, 33 + 16 * i)
    used[i] = used[i] + granted
    local estimate = before[i] * (length - into[i]) / length + used[i]
    local wait = 0
    if lacking > limit then
      wait = -1
    elseif lacking == 0 or estimate + lacking <= limit then
      wait = 0
    elseif used[i] + lacking <= limit then
      -- Within this window, once enough of the last one is out of sight.
      wait = math.ceil((length - into[i]) - (limit - used[i] - lacking) * length / before[i])
    else
      -- In the next, where this window is the last one.
      wait = math.ceil((length - into[i]) + length - (limit - lacking) * length / used[i])
    end
    local value = string.format('%.0f:%.0f:%.0f', number[i], used[i], before[i])
    if value ~= held[i] and (granted > 0 or back > 0 or moved[i]) then
      redis.call('SET', KEYS[behind + i], value, 'PX', math.ceil((2 * length - into[i]) / 1000) + 1)
    end
    local reset = 0
    if used[i] > 0 then reset = 2 * length - into[i] elseif before[i] > 0 then reset = length - into[i] end
    local remaining = math.max(0, math.floor(limit - estimate + 0.000001))
    reply = reply .. pack('<dddd', remaining, math.ceil(reset), wait, 0)
  end
  return reply
end
