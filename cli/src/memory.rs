//! How the C library's allocator treats a process that runs for months, or reads a whole repository.

/// Blocks of this size and more go back to the system when they are freed.
const THRESHOLD: i32 = 1 << 20;

/// Keeps memory where it is needed: glibc raises its threshold with every large block that is freed, and then
/// keeps some tens of MiB in the arenas of threads that come and go.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code)]
pub fn give_back() {
    // SAFETY: mallopt only sets a parameter of the allocator; no other thread runs yet.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, THRESHOLD);
    }
}

/// For what does little on many threads: they share their memory, instead of keeping some each.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code)]
pub fn share() {
    // SAFETY: as above.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Other allocators are left as they are.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn share() {}

/// Other allocators are left as they are.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn give_back() {
    let _ = THRESHOLD;
}
