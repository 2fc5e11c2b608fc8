"""trace.py FILE: bursts of device work (split by gaps of 0.3 ms and more), each with its kernels by time."""
import collections, re, sys
rows = []
for line in open(sys.argv[1]):
    a, b, kind, grid, block, name = line.rstrip("\n").split(" ", 5)
    rows.append((int(a), int(b), kind, grid, block, name))
rows.sort()
def short(n):
    n = re.sub(r"^_ZN?K?", "", n)
    m = re.match(r"(\d+)still(\d+)", n)
    if m:
        rest = n[len("5still"):]; k = re.match(r"(\d+)", rest).group(1); n = rest[len(k):len(k) + int(k)] + " " + re.sub(r"[^0-9]+", " ", rest[len(k)+int(k):])[:24]
    return n[:70]
gap = float(sys.argv[2]) * 1e6 if len(sys.argv) > 2 else 0.3e6
bursts, now, end = [], [], 0
for r in rows:
    if now and r[0] - end > gap:
        bursts.append(now); now = []
    now.append(r); end = max(end, r[1])
bursts.append(now)
least = float(sys.argv[3]) if len(sys.argv) > 3 else 1.0
for b in bursts:
    span = (max(r[1] for r in b) - b[0][0]) / 1e6
    if span < least or len(b) < 20: continue
    busy = sum(r[1] - r[0] for r in b) / 1e6
    print(f"== at {(b[0][0]-rows[0][0])/1e6:.1f} ms: span {span:.3f} ms, {len(b)} ops, busy {busy:.3f} ms")
    by = collections.defaultdict(lambda: [0, 0])
    for r in b:
        e = by[short(r[5]) + (f" [{r[3]}]" if r[2] == "K" else "")]; e[0] += r[1] - r[0]; e[1] += 1
    for n, (t, c) in sorted(by.items(), key=lambda x: -x[1][0])[:26]:
        print(f"   {t/1e6:8.3f} ms {c:5d} x {t/c/1e3:8.2f} us  {n}")
