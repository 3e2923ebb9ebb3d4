//! Checks of the machine's capabilities, for tests. The file systems that tests run on are in
//! `file_systems`, and are exported here too.
//!
//! A test that needs a capability that a machine may lack begins with [`needs!`]. If the capability
//! is missing, the macro prints one line past the test harness's capture, and the test returns. The
//! test fails instead if `RAMSNAP_REQUIRE` lists the capability (comma-separated, or `all`; `cargo
//! xtask test` sets `all` in CI).
//!
//! A test repeats its work a few times, and many times if [`thorough`] returns true: `cargo xtask
//! prove`.

pub use file_systems::FileSystem;
#[cfg(target_os = "linux")]
pub use file_systems::{HugeFs, LoopMount, Overlay, ReadOnlyBind, TinyTmpfs, tool};

mod alone;
mod need;
mod not_run;
mod recycling;
#[cfg(target_os = "linux")]
mod signal_mask;
#[cfg(target_os = "linux")]
mod user_namespace;

pub use alone::is_alone;
pub use need::{Need, REQUIRE};
pub use not_run::{NOT_RUN, not_run};
pub use recycling::recycling_dir;
#[cfg(target_os = "linux")]
pub use signal_mask::{assert_handles_no_signals, assert_this_thread_handles_no_signals};
#[cfg(target_os = "linux")]
pub use user_namespace::in_user_namespace;

/// The environment variable that makes tests [`thorough`].
pub const THOROUGH: &str = "RAMSNAP_THOROUGH";

/// Returns whether tests repeat their work many times, with other random numbers each time, and
/// wait for races.
///
/// `cargo xtask prove tests` sets `RAMSNAP_THOROUGH=1`. Without it, a test is deterministic.
#[must_use]
pub fn thorough() -> bool {
    std::env::var_os(THOROUGH).is_some_and(|value| value == "1")
}

/// Returns `few`, or `many` if tests are [`thorough`].
#[must_use]
pub fn rounds<T>(few: T, many: T) -> T {
    if thorough() { many } else { few }
}

/// Returns from the calling test unless this machine meets all of its needs.
///
/// Takes variants of [`Need`], and prints the name of the calling function. `=> VALUE` is what the
/// function returns.
///
/// # Examples
/// ```
/// # use test_machine::FileSystem;
/// fn a_page_is_unprotected() {
///     test_machine::needs!(Userfaultfd);
/// }
///
/// fn a_file_on_xfs_has_holes() -> std::io::Result<()> {
///     test_machine::needs!(Root, Mount(FileSystem::XFS) => Ok(()));
///     Ok(())
/// }
/// ```
///
/// # Panics
/// As [`Need::met`].
#[macro_export]
macro_rules! needs {
    ($($need:expr),+ $(,)?) => {
        $crate::needs!($($need),+ => ())
    };
    ($($need:expr),+ => $value:expr) => {
        {
            #[allow(unused_imports)]
            use $crate::Need::*;
            fn here() {}
            let test = $crate::enclosing(here);
            if !([$($need),+].into_iter().all(|need: $crate::Need| need.met(test))) {
                return $value;
            }
        }
    };
}

/// Returns the path of the function that `here` is declared in.
#[doc(hidden)]
#[must_use]
pub fn enclosing<F>(_here: F) -> &'static str {
    let path = std::any::type_name::<F>();
    let path = path.strip_suffix("::here").unwrap_or(path);
    path.trim_end_matches("::{{closure}}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_test_is_its_path() {
        fn here() {}
        let inside = || {
            fn here() {}
            enclosing(here)
        };
        let path = "test_machine::tests::the_name_of_a_test_is_its_path";
        assert_eq!(enclosing(here), path);
        assert_eq!(inside(), path);
    }

    /// For `a_test_returns_unless_its_needs_are_met`, which runs it.
    #[test]
    #[ignore = "run by another test"]
    fn a_test_with_an_unmet_need() {
        // No machine mounts it by a loop device: it is not on a disk.
        needs!(Root, Mount(FileSystem::TMPFS));
        unreachable!("the need cannot be met");
    }

    #[test]
    fn a_test_returns_unless_its_needs_are_met() {
        let run = |required: Option<&str>| {
            let mut test = std::process::Command::new(std::env::current_exe().expect("its path"));
            test.args(["--exact", "tests::a_test_with_an_unmet_need", "--ignored"]);
            test.env_remove(NOT_RUN).env_remove(REQUIRE);
            if let Some(required) = required {
                test.env(REQUIRE, required);
            }
            test.output().expect("the test runs")
        };
        let returned = run(None);
        let line = "NOT RUN test_machine::tests::a_test_with_an_unmet_need: this machine has no ";
        let stderr = String::from_utf8_lossy(&returned.stderr);
        assert!(returned.status.success(), "{returned:?}");
        assert!(stderr.contains(line), "{stderr}");
        assert!(!run(Some("all")).status.success());
        assert!(run(Some("kvm")).status.success());
    }
}
