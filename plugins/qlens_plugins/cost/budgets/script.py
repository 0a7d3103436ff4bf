"""The Lua scripts that keep budgets in Redis: all budgets that are asked for together, in one step."""

from __future__ import annotations

from qlens import Script

_COMMON = """\
-- KEYS: epoch, sums, accounts, windows, raised, alive, how the keys of processes begin, and when one was heard last.
-- Sums go beyond 2^53, where a double is not exact: each is a pair of high and low, in units of 10^9 and of 1.
local BASE = 1000000000
local function pair(high, low)
  local carry = math.floor(low / BASE)
  return {high + carry, low - carry * BASE}
end
local function num(text)
  local sign, digits = 1, text
  if string.sub(text, 1, 1) == '-' then sign, digits = -1, string.sub(text, 2) end
  local high = #digits > 9 and tonumber(string.sub(digits, 1, -10)) or 0
  return pair(sign * high, sign * tonumber(string.sub(digits, -9)))
end
local function add(a, b) return pair(a[1] + b[1], a[2] + b[2]) end
local function sub(a, b) return pair(a[1] - b[1], a[2] - b[2]) end
local function below(a, b) return a[1] < b[1] or (a[1] == b[1] and a[2] < b[2]) end
local function most(a, b) return below(a, b) and b or a end
local function least(a, b) return below(a, b) and a or b end
local function fifth(a)
  local high = math.floor(a[1] / 5)
  return pair(high, math.floor(((a[1] - high * 5) * BASE + a[2]) / 5))
end
local text
function text(a)
  if a[1] < 0 then return '-' .. text(pair(-a[1], -a[2])) end
  return a[1] > 0 and string.format('%.0f%09.0f', a[1], a[2]) or string.format('%.0f', a[2])
end
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
-- An epoch ends when the server was started anew or emptied: what is in it then is not to be believed.
local epoch, began, opens
local kept = redis.call('GET', KEYS[1])
if kept then
  local server
  server, epoch, began, opens = string.match(kept, '^(%x+) (%x+) (%d+) (%d+)$')
  if server == run then began, opens = tonumber(began), tonumber(opens) else epoch = nil end
end
local function row(place)
  local found = redis.call('HGET', KEYS[2], place)
  if not found then return nil end
  local cap, seeded, base, spent, held, excess = string.match(found, '^(%d+) (%d) (%d+) (%-?%d+) (%-?%d+) (%-?%d+)$')
  return {cap = cap, seeded = seeded, base = num(base), spent = num(spent), held = num(held), excess = num(excess)}
end
local function write(place, r)
  local sums = {r.cap, r.seeded, text(r.base), text(r.spent), text(r.held), text(r.excess)}
  redis.call('HSET', KEYS[2], place, table.concat(sums, ' '))
end
local function part(found)
  local spent, held, excess, number = string.match(found, '^(%d+) (%-?%d+) (%-?%d+) (%d+)$')
  return num(spent), num(held), num(excess), tonumber(number)
end
local function charge(process)
  local key = KEYS[7] .. process
  local all = redis.call('HGETALL', key)
  for i = 1, #all, 2 do
    local place = string.match(all[i], '^(.+) %d+$')
    local r = row(place)
    if r then
      local _, held, excess = part(all[i + 1])
      r.spent = add(r.spent, add(held, excess))
      r.held, r.excess = sub(r.held, held), sub(r.excess, excess)
      write(place, r)
    end
  end
  redis.call('DEL', key)
  redis.call('ZREM', KEYS[6], process)
end
local function reap()
  local heard = tonumber(redis.call('GET', KEYS[8]) or now)
  if now - heard >= 1000 or heard == now then redis.call('SET', KEYS[8], string.format('%.0f', now)) end
  if now - heard > 5000 then -- nobody was heard: the server was away, and nobody need be dead
    for _, process in ipairs(redis.call('ZRANGEBYSCORE', KEYS[6], '-inf', now + 5000)) do
      redis.call('ZADD', KEYS[6], now + 5000, process)
    end
  end
  local dead = redis.call('ZRANGEBYSCORE', KEYS[6], '-inf', now, 'LIMIT', 0, 20)
  for i = 1, #dead do charge(dead[i]) end
end
"""

SYNC = Script(
    "budgets sync",
    _COMMON
    + """\
-- ARGV: epoch, process, number of this message, milliseconds to live, the time in which increases end; for each
-- budget: account, window, limit, tolerance, spent, held, excess, floor, part, 1 if known, spare, what it is, the
-- accounts beside it, how many needs, and for each of these likely and excess.
if not epoch then return {'lost'} end
if epoch ~= ARGV[1] then return {'epoch', epoch} end
reap()
local process, number = ARGV[2], tonumber(ARGV[3])
local key = KEYS[7] .. process
local is_alive = redis.call('ZSCORE', KEYS[6], process)
local asks, unseeded, n = {}, {'seed', began}, 5
while n < #ARGV do
  local ask = {}
  for i = 1, 14 do ask[i] = ARGV[n + i] end
  n = n + 14
  ask.needs = {}
  for i = 1, tonumber(ask[14]) do ask.needs[i], n = {num(ARGV[n + 1]), num(ARGV[n + 2])}, n + 2 end
  if ask[10] == '1' and not is_alive then return {'given up'} end
  if #ask.needs > 0 and now < opens then return {'wait'} end
  ask.place = ask[1] .. ' ' .. ask[2]
  ask.row, ask.mine = row(ask.place), ask.place .. ' ' .. ask[9]
  ask.before = redis.call('HGET', key, ask.mine)
  if ask.before then
    local _, _, _, last = part(ask.before)
    -- Whoever sent it has given it up, and has said something else since.
    if last > number then return {'late'} end
  end
  -- A window that began after the epoch did has no past, and what a budget beside it was told of is of this one, too.
  local is_told = tonumber(ask[2]) * 1000 >= began
  for id in string.gmatch(ask[13], '%S+') do
    local other = row(id .. ' ' .. ask[2])
    is_told = is_told or other and other.seeded == '1'
  end
  local is_seeded = ask.row and ask.row.seeded == '1' or not ask.row and is_told
  if not is_seeded and now >= opens then unseeded[#unseeded + 1] = #asks end
  ask.seeded = is_seeded and '1' or '0'
  asks[#asks + 1] = ask
end
local function known(ask)
  local r = row(ask.place) -- anew: another part of it may have been written just now
  if not r then
    r = {seeded = ask.seeded, base = num('0'), spent = num('0'), held = num('0'), excess = num('0')}
    redis.call('HSETNX', KEYS[3], ask[1], ask[12])
    local windows, found = {}, redis.call('HGET', KEYS[4], ask[1]) or ''
    for each in string.gmatch(found, '%d+') do windows[#windows + 1] = tonumber(each) end
    windows[#windows + 1] = tonumber(ask[2])
    table.sort(windows)
    for i = 1, #windows do windows[i] = string.format('%.0f', windows[i]) end
    local old = #windows > 2 and row(ask[1] .. ' ' .. windows[1])
    if #windows > 2 and not (old and (old.held[1] > 0 or old.held[2] > 0)) and windows[1] ~= ask[2] then
      redis.call('HDEL', KEYS[2], ask[1] .. ' ' .. windows[1])
      table.remove(windows, 1)
    end
    redis.call('HSET', KEYS[4], ask[1], table.concat(windows, ' '))
  end
  r.cap = ask[3]
  r.base = most(r.base, num(ask[8]))
  return r
end
if #unseeded > 2 then
  -- First what this process was told of each: a ledger does not say which names of a model had spent it.
  for _, ask in ipairs(asks) do write(ask.place, known(ask)) end
  return unseeded
end
redis.call('ZADD', KEYS[6], now + tonumber(ARGV[4]), process)
local told = {'told'}
for _, ask in ipairs(asks) do
  local place, r = ask.place, known(ask)
  local spent, held, excess = num('0'), num('0'), num('0')
  if ask.before then spent, held, excess = part(ask.before) end
  local my_held, my_excess = num(ask[6]), num(ask[7])
  r.spent = add(r.spent, sub(num(ask[5]), spent))
  r.held, r.excess = add(r.held, sub(my_held, held)), add(r.excess, sub(my_excess, excess))
  local limit, till, raised = num(ask[3]), '9007199254740992', redis.call('HGET', KEYS[5], ask[1]) or ''
  if raised ~= '' then
    for _, each in ipairs(cjson.decode(raised)) do
      if each[3] > tonumber(ARGV[5]) then
        limit = add(limit, num(each[2]))
        if each[3] < tonumber(till) then till = string.format('%.0f', each[3]) end
      end
    end
  end
  local free = sub(sub(sub(limit, r.base), r.spent), r.held)
  local slack, granted, all = sub(num(ask[4]), r.excess), '', true
  local beside, beside_held = num('0'), num('0')
  for id in string.gmatch(ask[13], '%S+') do
    local other = row(id .. ' ' .. ask[2])
    if other then
      beside, beside_held = add(beside, add(other.base, other.spent)), add(beside_held, other.held)
      slack = sub(slack, other.excess)
    end
  end
  free = sub(free, add(beside, beside_held))
  for _, need in ipairs(ask.needs) do
    if below(free, need[1]) or below(slack, need[2]) then
      granted, all = granted .. '0', false
    else
      granted = granted .. '1'
      free, slack = sub(free, need[1]), sub(slack, need[2])
      r.held, my_held = add(r.held, need[1]), add(my_held, need[1])
      r.excess, my_excess = add(r.excess, need[2]), add(my_excess, need[2])
    end
  end
  local spare = all and most(num('0'), least(num(ask[11]), sub(free, fifth(limit)))) or num('0')
  r.held, my_held = add(r.held, spare), add(my_held, spare)
  write(place, r)
  redis.call('HSET', key, ask.mine, table.concat({ask[5], text(my_held), text(my_excess), ARGV[3]}, ' '))
  local all_held = text(add(r.held, beside_held))
  told[#told + 1] = {
    granted, text(spare), text(add(r.base, r.spent)), all_held, text(limit), till, text(beside), raised
  }
end
return told
""",
)

RENEW = Script(
    "budgets renew",
    _COMMON
    + """\
-- ARGV: epoch, process, milliseconds to live.
if not epoch then return {'lost'} end
if epoch ~= ARGV[1] then return {'epoch', epoch} end
reap()
local is_alive = redis.call('ZSCORE', KEYS[6], ARGV[2])
if is_alive then redis.call('ZADD', KEYS[6], now + tonumber(ARGV[3]), ARGV[2]) end
if now < opens then return {'wait'} end
return {is_alive and 'told' or 'given up'}
""",
)

LEAVE = Script(
    "budgets leave",
    _COMMON
    + """\
-- ARGV: process.
if epoch then charge(ARGV[1]) end
return {'told'}
""",
)

BEGIN = Script(
    "budgets begin",
    _COMMON
    + """\
-- ARGV: a new epoch, milliseconds until it admits calls, 1 if nothing was spent but what is said.
-- One that is far from admitting any was left half said.
if epoch and opens - now < 3600000 then return {'epoch', epoch, opens - now} end
for _, process in ipairs(redis.call('ZRANGE', KEYS[6], 0, -1)) do redis.call('DEL', KEYS[7] .. process) end
redis.call('DEL', KEYS[2], KEYS[4], KEYS[6])
local since = ARGV[3] == '1' and 0 or now
local opens = now + tonumber(ARGV[2])
redis.call('SET', KEYS[1], string.format('%s %s %.0f %.0f', run, ARGV[1], since, opens))
return {'epoch', ARGV[1], opens - now}
""",
)

OPEN = Script(
    "budgets open",
    _COMMON
    + """\
-- ARGV: epoch, milliseconds until it admits calls.
if not epoch then return {'lost'} end
if epoch ~= ARGV[1] then return {'epoch', epoch} end
redis.call('SET', KEYS[1], string.format('%s %s %.0f %.0f', run, epoch, began, now + tonumber(ARGV[2])))
return {'told'}
""",
)

SEED = Script(
    "budgets seed",
    _COMMON
    + """\
-- ARGV: epoch, account, window, limit, what was spent, what the account is, the accounts beside it: in these was spent
-- what is known of them, and in this one the rest.
if not epoch then return {'lost'} end
if epoch ~= ARGV[1] then return {'epoch', epoch} end
local place = ARGV[2] .. ' ' .. ARGV[3]
local r = row(place)
if not r then
  r = {cap = ARGV[4], base = num('0'), spent = num('0'), held = num('0'), excess = num('0')}
  redis.call('HSETNX', KEYS[3], ARGV[2], ARGV[6])
  local windows = redis.call('HGET', KEYS[4], ARGV[2])
  redis.call('HSET', KEYS[4], ARGV[2], windows and windows .. ' ' .. ARGV[3] or ARGV[3])
end
local rest = num(ARGV[5])
for id in string.gmatch(ARGV[7], '%S+') do
  local other = row(id .. ' ' .. ARGV[3])
  if other then
    rest, other.seeded = sub(rest, other.base), '1'
    write(id .. ' ' .. ARGV[3], other)
  end
end
-- What processes knew of, or what the ledger has: whichever is more, so that it is never too little.
r.base, r.seeded = most(r.base, rest), '1'
write(place, r)
return {'told'}
""",
)

RAISE = Script(
    "budgets raise",
    _COMMON
    + """\
-- ARGV: epoch, account, the increase as JSON, the time in which increases end.
if not epoch then return {'lost'} end
if epoch ~= ARGV[1] then return {'epoch', epoch} end
local all, new = {}, cjson.decode(ARGV[3])
for _, each in ipairs(cjson.decode(redis.call('HGET', KEYS[5], ARGV[2]) or '[]')) do
  if each[1] == new[1] then return {'told'} end
  if each[3] > tonumber(ARGV[4]) then all[#all + 1] = each end
end
all[#all + 1] = new
redis.call('HSET', KEYS[5], ARGV[2], cjson.encode(all))
return {'told'}
""",
)

SWEEP = Script(
    "budgets sweep",
    _COMMON
    + """\
-- ARGV: epoch, process, the time, what is swept, where to go on, how many.
-- A window is dropped when it is over by the clock here and by the gateway's, for as long as it lasted and more: what
-- is spent in it counts for nothing any more. One in which something is held is kept until that is settled or charged.
if not epoch then return {'lost'} end
if epoch ~= ARGV[1] then return {'epoch', epoch} end
local time, days = math.min(tonumber(ARGV[3]), now / 1000), {day = 1, week = 7, month = 31}
if ARGV[4] == 'parts' then -- what this process has said of windows that are gone
  local found = redis.call('HSCAN', KEYS[7] .. ARGV[2], ARGV[5], 'COUNT', ARGV[6])
  for i = 1, #found[2], 2 do
    if not row(string.match(found[2][i], '^(.+) %d+$')) then redis.call('HDEL', KEYS[7] .. ARGV[2], found[2][i]) end
  end
  return {'told', found[1]}
end
local found = redis.call('HSCAN', KEYS[4], ARGV[5], 'COUNT', ARGV[6])
for i = 1, #found[2], 2 do
  local id, kept, raised = found[2][i], {}, {}
  local length = days[cjson.decode(redis.call('HGET', KEYS[3], id) or '[0,0,0,0,0,""]')[6]]
  for _, each in ipairs(cjson.decode(redis.call('HGET', KEYS[5], id) or '[]')) do
    if each[3] > time then raised[#raised + 1] = each end
  end
  for window in string.gmatch(found[2][i + 1], '%d+') do
    local r = row(id .. ' ' .. window)
    local is_free = not r or (r.held[1] == 0 and r.held[2] == 0 and r.excess[1] == 0 and r.excess[2] == 0)
    if length and #raised == 0 and is_free and tonumber(window) + 2 * length * 86400 < time then
      redis.call('HDEL', KEYS[2], id .. ' ' .. window)
    else
      kept[#kept + 1] = window
    end
  end
  if #raised == 0 then redis.call('HDEL', KEYS[5], id) end
  if #kept == 0 then
    redis.call('HDEL', KEYS[3], id)
    redis.call('HDEL', KEYS[4], id)
  else
    redis.call('HSET', KEYS[4], id, table.concat(kept, ' '))
  end
end
return {'told', found[1]}
""",
)

LIST = Script(
    "budgets list",
    _COMMON
    + """\
-- ARGV: epoch, or - of whoever has spent nothing; where to go on, how many, perhaps one account.
if not epoch then return {'lost'} end
if epoch ~= ARGV[1] and ARGV[1] ~= '-' then return {'epoch', epoch} end
local cursor, ids = '0', {ARGV[4]}
if ARGV[4] == '' then
  local found = redis.call('HSCAN', KEYS[4], ARGV[2], 'COUNT', ARGV[3])
  cursor, ids = found[1], {}
  for i = 1, #found[2], 2 do ids[#ids + 1] = found[2][i] end
end
local told = {'told', cursor}
for _, id in ipairs(ids) do
  local windows = redis.call('HGET', KEYS[4], id)
  if windows then
    local latest = 0
    for each in string.gmatch(windows, '%d+') do latest = math.max(latest, tonumber(each)) end
    local window = string.format('%.0f', latest)
    local r = row(id .. ' ' .. window)
    local raised = redis.call('HGET', KEYS[5], id) or '[]'
    if r then
      local account = redis.call('HGET', KEYS[3], id)
      told[#told + 1] = {account, window, r.cap, text(add(r.base, r.spent)), text(r.held), raised}
    end
  end
end
return told
""",
)
