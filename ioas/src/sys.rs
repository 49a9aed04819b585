//! The unsafe part: the arena in which clients' shared files are mapped, and the copy that survives them.
//!
//! The arena is one stretch of the server's address space, reserved without access and never given to anything else.
//! Page n of the arena is where frame n can be reached, so a frame becomes a host address by one addition, and a frame
//! that nobody has mapped is an address without access, never somebody else's object.
//!
//! A client can cut, punch or exhaust what the server has mapped, and then an access raises SIGBUS; an arena page that
//! is not mapped yet raises SIGSEGV. Both happen in one copy routine only, at instructions that the handler knows: it
//! makes the routine return the signal's number. A fault at any other instruction, or at an address outside the arena,
//! goes to the handler that was there before. On architectures without such a routine the kernel copies
//! (process_vm_readv on ourselves) and answers EFAULT instead.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::OnceLock;

/// The arena, reserved once per process.
#[derive(Debug)]
pub(crate) struct Arena {
    base: usize,
    length: u64,
}

/// A copy met an arena page that could not be accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CopyFault {
    /// The page is mapped but cannot be had (SIGBUS).
    Bus,
    /// The page is not mapped, or not for this access (SIGSEGV).
    NotMapped,
}

impl Arena {
    /// What is asked for, and what is settled for at the least, in bytes.
    const WANTED: u64 = 1 << 45;
    const LEAST: u64 = 1 << 33;
    /// The arena starts at a multiple of this, so that huge pages can be used by the host.
    const ALIGNMENT: usize = 1 << 30;

    /// The arena of this process; reserved at the first call.
    ///
    /// # Errors
    /// What mmap or sigaction answered, kept for all later calls.
    pub(crate) fn get() -> Result<&'static Self, io::ErrorKind> {
        static ARENA: OnceLock<Result<Arena, io::ErrorKind>> = OnceLock::new();
        ARENA.get_or_init(|| Self::reserve().map_err(|error| error.kind())).as_ref().map_err(|kind| *kind)
    }

    fn reserve() -> io::Result<Self> {
        let mut length = Self::WANTED;
        loop {
            match map_nothing(0, length as usize + Self::ALIGNMENT, 0) {
                Ok(start) => {
                    let arena = Self { base: start.next_multiple_of(Self::ALIGNMENT), length };
                    fault::install(arena.base, arena.base + length as usize)?;
                    return Ok(arena);
                }
                Err(_) if length > Self::LEAST => length /= 2,
                Err(error) => return Err(error),
            }
        }
    }

    /// Its length in bytes.
    pub(crate) const fn length(&self) -> u64 {
        self.length
    }

    /// Maps `length` bytes of a file from `offset` on at byte `at`, in place of what was mapped there.
    ///
    /// # Errors
    /// What mmap answered; what was mapped there stays.
    pub(crate) fn map_file(
        &self,
        at: u64,
        length: u64,
        file: BorrowedFd<'_>,
        offset: u64,
        writable: bool,
    ) -> io::Result<()> {
        let address = self.address(at, length).ok_or(io::ErrorKind::InvalidInput)?;
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let protection = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: mmap with MAP_FIXED replaces only the pages of `address..address + length`, which `address` has
        // checked to lie in the arena; nothing but the copy routine ever accesses the arena, and no reference into it
        // exists.
        let mapped = unsafe {
            libc::mmap(address as *mut libc::c_void, length as usize, protection, flags, file.as_raw_fd(), offset)
        };
        if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Takes away what is mapped in `length` bytes from `at` on.
    ///
    /// # Errors
    /// What mmap answered; what was mapped there stays.
    pub(crate) fn clear(&self, at: u64, length: u64) -> io::Result<()> {
        let address = self.address(at, length).ok_or(io::ErrorKind::InvalidInput)?;
        map_nothing(address, length as usize, libc::MAP_FIXED).map(|_| ())
    }

    /// Copies out of the arena. `None` when the bytes do not lie in it.
    #[inline]
    pub(crate) fn copy_out(&self, at: u64, data: &mut [u8]) -> Option<Result<(), CopyFault>> {
        let address = self.address(at, data.len() as u64)?;
        Some(fault::copy(data.as_mut_ptr(), address as *const u8, data.len()))
    }

    /// Copies into the arena. `None` when the bytes do not lie in it.
    #[inline]
    pub(crate) fn copy_in(&self, at: u64, data: &[u8]) -> Option<Result<(), CopyFault>> {
        let address = self.address(at, data.len() as u64)?;
        Some(fault::copy(address as *mut u8, data.as_ptr(), data.len()))
    }

    /// Sets the aligned word at `at` to `new` if it is `old`, atomically; false when it is another. `None` when it does
    /// not lie in the arena, or the architecture has no such instruction that can be recovered.
    pub(crate) fn exchange(&self, at: u64, old: u64, new: u64) -> Option<Result<bool, CopyFault>> {
        let address = self.address(at, 8).filter(|address| address % 8 == 0)?;
        fault::exchange(address as *mut u64, old, new)
    }

    #[inline]
    fn address(&self, at: u64, length: u64) -> Option<usize> {
        (at.checked_add(length)? <= self.length).then_some(self.base + at as usize)
    }
}

/// Reserves address space without access; at `address` with MAP_FIXED, else anywhere.
fn map_nothing(address: usize, length: usize, fixed: i32) -> io::Result<usize> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | fixed;
    // SAFETY: without MAP_FIXED mmap takes free address space; with it the callers give a range inside the arena,
    // which only the copy routine accesses.
    let mapped = unsafe { libc::mmap(address as *mut libc::c_void, length, libc::PROT_NONE, flags, -1, 0) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(mapped as usize) }
}

#[cfg(target_arch = "x86_64")]
mod fault {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Once, OnceLock};
    use std::{io, mem, ptr};

    use super::CopyFault;

    // Single instructions for the sizes that registers and queue entries have, so that they are not torn; 16 bytes at
    // a time up to 512, 64 above. (The string instruction stalls where stores are shortly ahead of loads modulo a page,
    // which is what a page-aligned client buffer and one of malloc's make. It copies the odd sizes.)
    std::arch::global_asm!(
        ".pushsection .text.ioas_guarded_copy,\"ax\",@progbits",
        ".p2align 4",
        ".globl ioas_guarded_copy",
        ".hidden ioas_guarded_copy",
        ".type ioas_guarded_copy,@function",
        "ioas_guarded_copy:",
        "cmp rdx, 16",
        "ja 30f",
        "je 16f",
        "cmp rdx, 8",
        "je 8f",
        "cmp rdx, 4",
        "je 4f",
        "cmp rdx, 2",
        "je 2f",
        "20:",
        "mov rcx, rdx",
        "rep movsb",
        "xor eax, eax",
        "ret",
        "16:",
        "movdqu xmm0, [rsi]",
        "movdqu [rdi], xmm0",
        "xor eax, eax",
        "ret",
        "8:",
        "mov rax, [rsi]",
        "mov [rdi], rax",
        "xor eax, eax",
        "ret",
        "4:",
        "mov eax, [rsi]",
        "mov [rdi], eax",
        "xor eax, eax",
        "ret",
        "2:",
        "movzx eax, word ptr [rsi]",
        "mov [rdi], ax",
        "xor eax, eax",
        "ret",
        "30:",
        "cmp rdx, 512",
        "ja 40f",
        "31:",
        "movdqu xmm0, [rsi]",
        "movdqu [rdi], xmm0",
        "add rsi, 16",
        "add rdi, 16",
        "sub rdx, 16",
        "cmp rdx, 16",
        "jae 31b",
        "test rdx, rdx",
        "jz 32f",
        "movdqu xmm0, [rsi + rdx - 16]",
        "movdqu [rdi + rdx - 16], xmm0",
        "32:",
        "xor eax, eax",
        "ret",
        // 64 bytes first, then whole lines of the destination.
        "40:",
        "movdqu xmm0, [rsi]",
        "movdqu xmm1, [rsi + 16]",
        "movdqu xmm2, [rsi + 32]",
        "movdqu xmm3, [rsi + 48]",
        "movdqu [rdi], xmm0",
        "movdqu [rdi + 16], xmm1",
        "movdqu [rdi + 32], xmm2",
        "movdqu [rdi + 48], xmm3",
        "lea rax, [rdi + 64]",
        "and rax, -64",
        "sub rax, rdi",
        "add rsi, rax",
        "add rdi, rax",
        "sub rdx, rax",
        "41:",
        "movdqu xmm0, [rsi]",
        "movdqu xmm1, [rsi + 16]",
        "movdqu xmm2, [rsi + 32]",
        "movdqu xmm3, [rsi + 48]",
        "movdqa [rdi], xmm0",
        "movdqa [rdi + 16], xmm1",
        "movdqa [rdi + 32], xmm2",
        "movdqa [rdi + 48], xmm3",
        "add rsi, 64",
        "add rdi, 64",
        "sub rdx, 64",
        "cmp rdx, 64",
        "jae 41b",
        "jmp 20b",
        ".globl ioas_guarded_exchange",
        ".hidden ioas_guarded_exchange",
        ".type ioas_guarded_exchange,@function",
        "ioas_guarded_exchange:",
        "mov rax, rsi",
        "lock cmpxchg [rdi], rdx",
        "setne al",
        "movzx eax, al",
        "ret",
        ".globl ioas_guarded_copy_end",
        ".hidden ioas_guarded_copy_end",
        "ioas_guarded_copy_end:",
        // The handler continues here with the signal's number in rax.
        "ret",
        ".size ioas_guarded_copy, . - ioas_guarded_copy",
        ".popsection",
    );

    // SAFETY: declares what the assembly above defines. The routines obey the C calling convention; one copies `length`
    // bytes and returns 0, and either returns a signal's number when the handler has sent it to the end.
    unsafe extern "C" {
        fn ioas_guarded_copy(to: *mut u8, from: *const u8, length: usize) -> u32;
        // Returns 0 when it has exchanged, 1 when the word was another, or a signal's number.
        fn ioas_guarded_exchange(word: *mut u64, old: u64, new: u64) -> u32;
        // A label behind the routine, never called.
        fn ioas_guarded_copy_end();
    }

    static ARENA_START: AtomicUsize = AtomicUsize::new(0);
    static ARENA_END: AtomicUsize = AtomicUsize::new(0);
    static OLD_BUS: OnceLock<libc::sigaction> = OnceLock::new();
    static OLD_SEGV: OnceLock<libc::sigaction> = OnceLock::new();

    /// Copies between server memory and the arena; either pointer may lie in the arena.
    #[inline]
    pub(super) fn copy(to: *mut u8, from: *const u8, length: usize) -> Result<(), CopyFault> {
        // SAFETY: one side is a slice of `length` bytes that the caller borrows; the other lies in the arena, whose
        // faults at these instructions are recovered by the handler that was installed with the arena. The arena is
        // never behind a reference, and what others store there meanwhile is plain bytes.
        match unsafe { ioas_guarded_copy(to, from, length) } as i32 {
            0 => Ok(()),
            libc::SIGBUS => Err(CopyFault::Bus),
            _ => Err(CopyFault::NotMapped),
        }
    }

    /// Exchanges an aligned word of the arena.
    pub(super) fn exchange(word: *mut u64, old: u64, new: u64) -> Option<Result<bool, CopyFault>> {
        // SAFETY: the word lies in the arena, whose faults at this instruction are recovered as those of a copy; the
        // arena is never behind a reference, and the instruction is atomic with whatever others store there.
        Some(match unsafe { ioas_guarded_exchange(word, old, new) } as i32 {
            0 => Ok(true),
            1 => Ok(false),
            libc::SIGBUS => Err(CopyFault::Bus),
            _ => Err(CopyFault::NotMapped),
        })
    }

    /// Installs the handlers for faults in the arena, once.
    pub(super) fn install(start: usize, end: usize) -> io::Result<()> {
        static ONCE: Once = Once::new();
        ARENA_START.store(start, Ordering::Relaxed);
        ARENA_END.store(end, Ordering::Relaxed);
        let mut result = Ok(());
        ONCE.call_once(|| {
            result = install_one(libc::SIGBUS, &OLD_BUS).and_then(|()| install_one(libc::SIGSEGV, &OLD_SEGV));
        });
        result
    }

    fn install_one(signal: i32, old: &OnceLock<libc::sigaction>) -> io::Result<()> {
        // SAFETY: an all-zero sigaction is a valid value: the default action with an empty mask.
        let mut before: libc::sigaction = unsafe { mem::zeroed() };
        // SAFETY: asks for the current action; `before` is valid for the write.
        if unsafe { libc::sigaction(signal, ptr::null(), &raw mut before) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let _ = old.set(before);
        // SAFETY: as above.
        let mut action: libc::sigaction = unsafe { mem::zeroed() };
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: `action` names a handler of the three-argument form and is valid for the read; the handler touches
        // only atomics, its own arguments and what `old` holds, which is set.
        if unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    extern "C" fn handler(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
        if !recover(signal, info, context) {
            chain(signal, info, context);
        }
    }

    /// Sends the copy routine to its end when the fault is one of its own.
    fn recover(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) -> bool {
        // SAFETY: the kernel passes a valid siginfo to a SA_SIGINFO handler.
        let info = unsafe { &*info };
        // SAFETY: SIGBUS and SIGSEGV carry an address when the kernel raised them, which the code tells below; else
        // the bytes are some others of the same siginfo, and are not used.
        let address = unsafe { info.si_addr() } as usize;
        let in_arena = (ARENA_START.load(Ordering::Relaxed)..ARENA_END.load(Ordering::Relaxed)).contains(&address);
        // SAFETY: the kernel passes a valid ucontext to a SA_SIGINFO handler, and nobody else uses it now.
        let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
        let registers = &mut context.uc_mcontext.gregs;
        let at = registers[libc::REG_RIP as usize] as usize;
        let start = ioas_guarded_copy as *const () as usize;
        let end = ioas_guarded_copy_end as *const () as usize;
        if info.si_code <= 0 || !in_arena || !(start..end).contains(&at) {
            return false;
        }
        registers[libc::REG_RIP as usize] = end as i64;
        registers[libc::REG_RAX as usize] = i64::from(signal);
        true
    }

    /// Hands a signal that is not ours to the handler of before; the default action happens when it faults again.
    fn chain(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
        let old = if signal == libc::SIGBUS { OLD_BUS.get() } else { OLD_SEGV.get() };
        match old {
            Some(old) if old.sa_sigaction != libc::SIG_DFL && old.sa_sigaction != libc::SIG_IGN => {
                type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);
                // SAFETY: sigaction reported this address as the handler; one of the one-argument form ignores the
                // other two arguments in the C calling convention.
                let handler = unsafe { mem::transmute::<usize, Handler>(old.sa_sigaction) };
                handler(signal, info, context);
            }
            _ => {
                // SAFETY: resets to the default action, which is async-signal-safe; the instruction then faults again
                // and ends the process as it would have without us.
                unsafe { libc::signal(signal, libc::SIG_DFL) };
            }
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod fault {
    use std::io;

    use super::CopyFault;

    /// Copies between server memory and the arena; the kernel does it, and answers EFAULT for both kinds of fault.
    pub(super) fn copy(to: *mut u8, from: *const u8, length: usize) -> Result<(), CopyFault> {
        let local = libc::iovec { iov_base: to.cast(), iov_len: length };
        let remote = libc::iovec { iov_base: from.cast_mut().cast(), iov_len: length };
        // SAFETY: copies `length` bytes between two addresses of this process; the kernel checks both, one is a slice
        // that the caller borrows and the other lies in the arena, which is never behind a reference.
        let copied = unsafe { libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) };
        if copied == length as isize { Ok(()) } else { Err(CopyFault::NotMapped) }
    }

    /// The kernel has no call that exchanges a word and reports a fault.
    pub(super) fn exchange(_word: *mut u64, _old: u64, _new: u64) -> Option<Result<bool, CopyFault>> {
        None
    }

    pub(super) fn install(_start: usize, _end: usize) -> io::Result<()> {
        Ok(())
    }
}

/// Gives the calling thread the scheduling policy SCHED_IDLE.
pub(crate) fn schedule_idle() -> io::Result<()> {
    let parameter = libc::sched_param { sched_priority: 0 };
    // SAFETY: reads one struct sched_param; 0 is the calling thread.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameter) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    #[test]
    fn copy_of_every_size_moves_every_byte() {
        let arena = Arena::get().expect("an arena");
        let file = memfd_create("copy", MFdFlags::empty()).expect("a memfd");
        nix::unistd::ftruncate(&file, 0x10000).expect("a size");
        let at = arena.length() - 0x20_0000;
        arena.map_file(at, 0x10000, file.as_fd(), 0, true).expect("mapped");
        for length in (0..600).chain([4096, 0x8001]) {
            let data: Vec<u8> = (0..length).map(|byte| (byte * 7 + length) as u8).collect();
            arena.copy_in(at + 3, &data).expect("inside").expect("writable");
            let mut back = vec![0; length];
            arena.copy_out(at + 3, &mut back).expect("inside").expect("readable");
            assert_eq!(back, data, "{length}");
        }
        arena.clear(at, 0x10000).expect("cleared");
    }

    #[test]
    fn copy_from_a_page_that_is_not_mapped_is_an_error() {
        let arena = Arena::get().expect("an arena");
        let at = arena.length() - 0x40_0000;
        for length in [1, 2, 4, 8, 16, 17, 4096] {
            assert_eq!(arena.copy_out(at, &mut vec![0; length]), Some(Err(CopyFault::NotMapped)));
        }
        assert_eq!(arena.copy_out(arena.length() - 1, &mut [0; 2]), None);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn exchange_sets_only_what_is_expected_and_survives_a_hole() {
        let arena = Arena::get().expect("an arena");
        let file = memfd_create("exchange", MFdFlags::empty()).expect("a memfd");
        nix::unistd::ftruncate(&file, 0x1000).expect("a size");
        let at = arena.length() - 0x80_0000;
        arena.map_file(at, 0x2000, file.as_fd(), 0, true).expect("mapped");
        assert_eq!(arena.exchange(at + 8, 0, 5), Some(Ok(true)));
        assert_eq!(arena.exchange(at + 8, 0, 6), Some(Ok(false)));
        let mut word = [0; 8];
        arena.copy_out(at + 8, &mut word).expect("inside").expect("readable");
        assert_eq!(u64::from_le_bytes(word), 5);
        assert_eq!(arena.exchange(at + 0x1000, 0, 5), Some(Err(CopyFault::Bus)));
        assert_eq!(arena.exchange(at + 4, 0, 5), None, "not aligned");
        arena.clear(at, 0x2000).expect("cleared");
        assert_eq!(arena.exchange(at, 0, 5), Some(Err(CopyFault::NotMapped)));
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn copy_beyond_the_end_of_a_file_is_an_error() {
        let arena = Arena::get().expect("an arena");
        let file = memfd_create("short", MFdFlags::empty()).expect("a memfd");
        let at = arena.length() - 0x60_0000;
        arena.map_file(at, 0x1000, file.as_fd(), 0, true).expect("mapped");
        for length in [1, 2, 4, 8, 16, 17, 4096] {
            assert_eq!(arena.copy_in(at, &vec![0; length]), Some(Err(CopyFault::Bus)));
        }
        arena.clear(at, 0x1000).expect("cleared");
    }
}
