//! Tests that change limits of their whole process.

use std::process::Command;

/// Returns whether this process runs only `test`. If not, runs the test in a child process and
/// asserts that it passes.
///
/// # Panics
/// Panics if the test fails in the child process.
#[must_use]
pub fn is_alone(test: &str) -> bool {
    const ALONE: &str = "RAMSNAP_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let output = Command::new(std::env::current_exe().expect("own path"))
        .args(["--exact", test, "--nocapture"])
        .env(ALONE, "1")
        .output()
        .expect("started");
    let (stdout, stderr) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{stdout}{stderr}");
    assert!(stdout.contains("1 passed"), "{test} was not found");
    false
}
