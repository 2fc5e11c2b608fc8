# trace.sh OUT.so: builds the recorder with whatever CUPTI there is.
h=$(find /usr/local/cuda* /opt /root /usr/lib/python3 -name cupti.h -not -path '*triton*' 2>/dev/null | head -n 1); i=$(dirname "$h")
l=$(find "$(dirname "$i")" /usr/local/cuda* /opt -name 'libcupti.so*' 2>/dev/null | head -n 1)
c=$(find /usr/local/cuda* /opt -name cuda.h 2>/dev/null | head -n 1)
echo "cupti: $h $l"
g++ -O1 -shared -fPIC -I"$i" -I"$(dirname "$c")" "$(dirname "$0")/trace.cpp" -o "$1" "$l" -Wl,-rpath,"$(dirname "$l")"
