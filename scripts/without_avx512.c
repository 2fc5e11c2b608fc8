// For LD_PRELOAD on Linux, x86-64: the program sees this CPU without AVX-512, AVX-VNNI and AMX, so that it takes its AVX2 code.
// scripts/without-avx512.sh uses it.
//
// The kernel is asked to raise a signal wherever `cpuid` is executed (`arch_prctl(ARCH_SET_CPUID)`, which not every CPU and virtual
// machine can), and the handler answers with those features left out. What the dynamic linker has chosen before, as memcpy, stays.
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#ifndef ARCH_SET_CPUID
#define ARCH_SET_CPUID 0x1012
#endif
#define BIT(n) (1u << (n))

static struct sigaction others;

// Of this thread, and of those that it starts later.
static long allow_cpuid(long allowed) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, allowed); }

static void answer(int signal, siginfo_t* info, void* context) {
  (void)signal;
  greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
  const unsigned char* code = (const unsigned char*)registers[REG_RIP];
  if (info->si_code != SI_KERNEL || code[0] != 0x0f || code[1] != 0xa2) {  // no cpuid: the fault comes again, to whom it belongs
    sigaction(SIGSEGV, &others, NULL);
    return;
  }
  unsigned leaf = registers[REG_RAX], subleaf = registers[REG_RCX];
  unsigned a = leaf, b = 0, c = subleaf, d = 0;
  allow_cpuid(1);
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  allow_cpuid(0);
  if (leaf == 7 && subleaf == 0) {
    b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31));  // avx512 f dq ifma pf er cd bw vl
    c &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14));                                   // avx512 vbmi vbmi2 vnni bitalg vpopcntdq
    d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25));                // avx512 4vnniw 4fmaps vp2intersect fp16, amx
  }
  if (leaf == 7 && subleaf == 1) {
    a &= ~(BIT(4) | BIT(5) | BIT(21) | BIT(23));            // avx-vnni avx512-bf16 amx-fp16 avx-ifma
    d &= ~(BIT(4) | BIT(5) | BIT(8) | BIT(10) | BIT(19));  // avx-vnni-int8 avx-ne-convert amx-complex avx-vnni-int16 avx10
  }
  registers[REG_RAX] = a;
  registers[REG_RBX] = b;
  registers[REG_RCX] = c;
  registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void begin(void) {
  struct sigaction mine = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
  if (sigaction(SIGSEGV, &mine, &others) != 0 || allow_cpuid(0) != 0) {
    fputs("error: cpuid cannot be answered in this CPU's place; hint: grep cpuid_fault /proc/cpuinfo\n", stderr);
    exit(1);
  }
}
