//! The matrix unit of x86 CPUs (AMX): whether it is there.

/// What a CPU's matrix unit multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// bf16, summed in f32.
    Bf16,
    /// Bytes, summed in 32 bits.
    Int8,
}

/// Whether this CPU multiplies tiles of such numbers, and the system lets this process do so.
#[cfg(target_arch = "x86_64")]
pub fn multiplies(unit: Unit) -> bool {
    use std::arch::x86_64::__cpuid_count;

    // Leaf 7 is there where there is AVX-512. These bits have no name in stable Rust yet.
    let bits = 1 << 24
        | match unit {
            Unit::Bf16 => 1 << 22,
            Unit::Int8 => 1 << 25,
        };
    is_x86_feature_detected!("avx512f") && __cpuid_count(7, 0).edx & bits == bits && may_use_tiles()
}

/// No CPU of this architecture has it.
#[cfg(not(target_arch = "x86_64"))]
pub fn multiplies(_: Unit) -> bool {
    false
}

/// The shapes of the registers, as `ldtilecfg` reads them.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

#[cfg(target_arch = "x86_64")]
impl Shapes {
    /// Rows of each of the eight registers and bytes of a row; 0 of one that is not used.
    pub fn new(registers: [(u8, u16); 8]) -> Self {
        let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
        for (i, (count, bytes)) in registers.into_iter().enumerate() {
            (rows[i], row_bytes[i]) = (count, bytes);
        }
        Self { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
    }
}

/// Asks the system for leave to use tiles: threads that do need more memory when they are interrupted.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn may_use_tiles() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: the call changes what the process may do, and no memory.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}

/// How other systems are asked is not known here.
#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn may_use_tiles() -> bool {
    false
}
