//! The limit of open files.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// The most descriptors that are useful. The limit that a service or container permits may be a
/// thousand million, and macOS refuses more than it can have.
const MOST: u64 = if cfg!(target_os = "macos") {
    10_240
} else {
    65_536
};

/// Raises the limit of open files as far as this process may. The soft limit is often 1024, for
/// programs that use `select(2)`, and a chain keeps a quarter of it open.
pub fn raise_limit() {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return;
    };
    let raised = hard.min(MOST);
    if soft < raised {
        // Without it, files of long chains are opened more than once.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, raised, hard);
    }
}
