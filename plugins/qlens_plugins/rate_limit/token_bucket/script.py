"""The Lua script that takes from all buckets of a slot at once, or from none."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

from qlens import Script

TAKE = Script(
    "token_bucket",
    """\
-- KEYS: buckets, then places. ARGV: the number of buckets, the process, the milliseconds its places outlast it;
-- for each bucket: unit, room, 1 if it counts tokens, owed, extra, lost, alone; for each place: most, running, spare;
-- then for each call its tokens.
-- A bucket is "time missing": at a time in microseconds so many picoseconds were missing until it is full. Both are
-- whole numbers below 2^53, and written by %.0f: tostring() would round them to 14 digits.
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
local buckets, me, ttl = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local unit, room, tokens, extra, missing, granted = {}, {}, {}, {}, {}, {}
local n = 3
for i = 1, buckets do
  unit[i], room[i], tokens[i] = tonumber(ARGV[n + 1]), tonumber(ARGV[n + 2]), ARGV[n + 3] == '1'
  local owed, lost, alone = tonumber(ARGV[n + 4]), tonumber(ARGV[n + 6]), tonumber(ARGV[n + 7])
  extra[i], granted[i] = tonumber(ARGV[n + 5]), 0
  n = n + 7
  local left = lost -- a key outlives every process' knowledge of it: where there is none, the server has lost it
  local kept = redis.call('GET', KEYS[i])
  if kept then
    local at, was = string.match(kept, '^(%d+) (%d+)$')
    -- The clock of another server after a failover may be behind: nothing comes back then, and nothing is lost.
    left = tonumber(was) - math.max(0, now - tonumber(at)) * 1000000
  end
  left = math.max(0, left)
  -- All that was let pass alone is no more than the bucket gives: so what is said twice, after an answer that came too
  -- late, empties it, and no more than that.
  if alone > 0 then left = math.max(left, math.min(room[i], left + alone)) end
  missing[i] = math.max(0, left + owed)
end
local places = #KEYS - buckets
local most, mine, others, spare = {}, {}, {}, {}
for j = 1, places do
  most[j], mine[j], spare[j] = tonumber(ARGV[n + 1]), tonumber(ARGV[n + 2]), tonumber(ARGV[n + 3])
  others[j] = 0
  n = n + 3
  local key = KEYS[buckets + j]
  local all = redis.call('HGETALL', key)
  for k = 1, #all, 2 do
    if all[k] ~= me then
      local held, till = string.match(all[k + 1], '^(%d+) (%d+)$')
      if tonumber(till) > now then
        others[j] = others[j] + tonumber(held)
      else
        redis.call('HDEL', key, all[k])
      end
    end
  end
end
local verdicts, denied = {}, false
for c = n + 1, #ARGV do
  local amount, refused, longest = tonumber(ARGV[c]), 0, 0
  for i = 1, buckets do
    local q = tokens[i] and amount or 1
    local wait = missing[i] + q * unit[i] - room[i]
    if q > 0 and wait > 0 and wait >= longest then refused, longest = i, wait end
  end
  for j = 1, places do
    if refused == 0 and others[j] + mine[j] >= most[j] then refused = buckets + j end
  end
  if refused == 0 then
    for i = 1, buckets do missing[i] = missing[i] + (tokens[i] and amount or 1) * unit[i] end
    for j = 1, places do mine[j] = mine[j] + 1 end
  else
    denied = true
  end
  verdicts[#verdicts + 1] = refused
  verdicts[#verdicts + 1] = longest
end
local told = {}
for i = 1, buckets do
  -- Leases are given while a fifth is left: near the edge every call is asked for.
  local free = math.floor((room[i] * 0.8 - missing[i]) / unit[i])
  if extra[i] > 0 and free > 0 and not denied then
    granted[i] = math.min(extra[i], free)
    missing[i] = missing[i] + granted[i] * unit[i]
  end
  local life = math.ceil(math.max(missing[i], room[i]) / 1000000000) + 1000
  local value = string.format('%.0f %.0f', now, missing[i])
  redis.call('SET', KEYS[i], value, 'PX', string.format('%.0f', life))
  told[#told + 1] = missing[i]
  told[#told + 1] = granted[i]
end
for j = 1, places do
  local key, free = KEYS[buckets + j], math.floor(most[j] * 0.8) - others[j] - mine[j]
  if free > 0 and not denied then mine[j] = mine[j] + math.min(spare[j], free) end
  if mine[j] > 0 then
    redis.call('HSET', key, me, string.format('%.0f %.0f', mine[j], now + ttl * 1000))
    redis.call('PEXPIRE', key, ttl)
  else
    redis.call('HDEL', key, me)
  end
  told[#told + 1] = others[j]
  told[#told + 1] = mine[j]
end
return {verdicts, told, now}
""",
)

READ = Script(
    "token_bucket_read",
    """\
-- KEYS: buckets and places. What is missing of each bucket, in picoseconds; how many places are taken.
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
local found = {}
for i = 1, #KEYS do
  local taken, kind = 0, redis.call('TYPE', KEYS[i]).ok
  if kind == 'string' then
    local at, was = string.match(redis.call('GET', KEYS[i]), '^(%d+) (%d+)$')
    taken = math.max(0, tonumber(was) - math.max(0, now - tonumber(at)) * 1000000)
  elseif kind == 'hash' then
    for _, value in ipairs(redis.call('HVALS', KEYS[i])) do
      local held, till = string.match(value, '^(%d+) (%d+)$')
      if tonumber(till) > now then taken = taken + tonumber(held) end
    end
  end
  found[i] = taken
end
return found
""",
)

CLEAR = Script(
    "token_bucket_clear",
    """\
-- KEYS: a bucket, which is full from now on. It stays for as long as it would have: where there is none, the next
-- process that asks says what it knew was missing.
local t = redis.call('TIME')
if redis.call('EXISTS', KEYS[1]) == 1 then
  redis.call('SET', KEYS[1], string.format('%.0f 0', t[1] * 1000000 + t[2]), 'KEEPTTL')
end
return 1
""",
)


@frozen
class AskedBucket:
    """What the script is told of a bucket."""

    key: str
    unit: int
    """Picoseconds in which one unit comes back."""
    room: int
    """Picoseconds in which an empty bucket is full again."""
    tokens: bool
    owed: int = 0
    """Picoseconds by which it is emptier than the store knows; below 0: fuller."""
    extra: int = 0
    """Units that are wanted in advance."""
    lost: int = 0
    """Picoseconds that were missing as far as is known, in case the store has lost it."""
    alone: int = 0
    """Picoseconds for what was let pass while the store was away."""


@frozen
class AskedPlace:
    """What the script is told of a place."""

    key: str
    most: int
    running: int
    """How many calls run or are asked for already in this process; they count, even above `most`."""
    spare: int = 0
    """Places that are wanted in advance."""


def arguments(
    me: str, ttl_ms: int, buckets: Sequence[AskedBucket], places: Sequence[AskedPlace], calls: Sequence[int]
) -> tuple[list[str], list[str | int]]:
    """The script's keys and arguments."""
    args: list[str | int] = [len(buckets), me, ttl_ms]
    for bucket in buckets:
        args += [bucket.unit, bucket.room, int(bucket.tokens), bucket.owed, bucket.extra, bucket.lost, bucket.alone]
    for place in places:
        args += [place.most, place.running, place.spare]
    keys = [*(bucket.key for bucket in buckets), *(place.key for place in places)]
    return keys, [*args, *calls]
