"""api_trace.py FILE [LEAST_CALLS] [LAST]: windows of work between two waits for the device, the last ones first; of each the host's calls by time
(outermost ones; what calls nested in them are is listed apart), and what the device did meanwhile."""
import collections, re, sys
calls, work = [], []
for line in open(sys.argv[1]):
    start, end, kind, more, name = line.rstrip("\n").split(" ", 4)
    (calls if kind == "A" else work).append((int(start), int(end), more, name, kind))
least = int(sys.argv[2]) if len(sys.argv) > 2 else 400
last = int(sys.argv[3]) if len(sys.argv) > 3 else 4
calls.sort(key=lambda c: (c[0], -c[1]))
work.sort()
WAITS = {"cuStreamSynchronize", "cuCtxSynchronize", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cuEventSynchronize"}
outer, inner, ends = [], [], {}
for c in calls:
    if c[0] < ends.get(c[2], 0):
        inner.append(c)
    else:
        outer.append(c)
        ends[c[2]] = c[1]
windows, begun, now = [], None, []
for c in outer:
    now.append(c)
    if re.sub(r"_(v\d+|ptsz|v\d+_ptsz)$", "", c[3]) in WAITS:
        windows.append(now)
        now = []
windows = [w for w in windows if len(w) >= least][-last:]
def table(rows, width):
    by = collections.defaultdict(lambda: [0, 0, 0])
    for start, end, _, name, *_ in rows:
        e = by[name[:width]]
        e[0] += end - start; e[1] += 1; e[2] = max(e[2], end - start)
    for name, (t, n, most) in sorted(by.items(), key=lambda x: -x[1][0])[:26]:
        print(f"    {t / 1e6:8.3f} ms {n:6d} x {t / n / 1e3:8.2f} us (most {most / 1e3:8.1f})  {name}")
for w in windows:
    start, end = w[0][0], w[-1][1]
    inside = sum(c[1] - c[0] for c in w)
    device = [k for k in work if start <= k[0] < end]
    busy = sum(k[1] - k[0] for k in device)
    print(f"== window of {(end - start) / 1e6:.3f} ms: {len(w)} calls take {inside / 1e6:.3f} ms (the last, the wait, {(w[-1][1] - w[-1][0]) / 1e6:.3f}); "
          f"{len(device)} ops keep the device busy for {busy / 1e6:.3f} ms")
    table(w, 60)
    print("   nested calls:")
    table([c for c in inner if start <= c[0] < end], 60)
    print("   device:")
    table(device, 89)
