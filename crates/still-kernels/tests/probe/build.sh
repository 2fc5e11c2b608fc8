set -e
K=${K:-crates/still-kernels/src/cuda}
O=${O:-/tmp/probe}; mkdir -p $O
F="-O3 -std=c++17 --expt-relaxed-constexpr --extended-lambda -gencode=arch=compute_90a,code=sm_90a -I$K"
[ -e $O/a.o ] || nvcc $F -c $K/quantized_products.cu -o $O/a.o &
[ -e $O/b.o ] || nvcc $F -c $K/small_batch_products.cu -o $O/b.o &
nvcc $F -Xptxas -v -c ${P:-crates/still-kernels/tests/probe}/probe.cu -o $O/c.o 2> $O/c.log || cat $O/c.log
wait
nvcc -gencode=arch=compute_90a,code=sm_90a $O/a.o $O/b.o $O/c.o -o $O/probe
