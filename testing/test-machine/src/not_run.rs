//! Reports of tests that are not run.

use std::io::Write as _;

/// The environment variable that names a file to which each test that is not run appends a line.
///
/// `cargo xtask test` sets it, and prints the file at the end: a test harness hides what a passing
/// test prints.
pub const NOT_RUN: &str = "RAMSNAP_NOT_RUN";

/// Reports past the test harness that `test` is not run, and appends the report to the file that
/// `RAMSNAP_NOT_RUN` names.
pub fn not_run(test: &str, why: &str) {
    let line = format!("NOT RUN {test}: {why}\n");
    // Not eprintln!: the harness captures the output of passing tests.
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os(NOT_RUN) {
        let list = std::fs::File::options()
            .append(true)
            .create(true)
            .open(path);
        // A single write, so that lines of several processes are not mixed.
        let _ = list.and_then(|mut list| list.write_all(line.as_bytes()));
    }
}
