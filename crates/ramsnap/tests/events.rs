//! Events on stderr: `-v` and RAMSNAP_LOG.
#![cfg(target_os = "linux")]

mod support;

use std::path::Path;
use std::process::Command;

use support::{Ended, RAM, RAMSNAP};

/// Dumps `ram` to `out`, both in `dir`, with these options and this RAMSNAP_LOG.
fn dump(dir: &Path, out: &str, options: &[&str], log: Option<&str>) -> Ended {
    let ram = dir.join("ram");
    if !ram.exists() {
        std::fs::write(&ram, b"S3cr3t!!".repeat(RAM as usize / 8)).unwrap();
    }
    let mut command = Command::new(RAMSNAP);
    command.args(options).arg("dump").arg(ram);
    command
        .arg("-o")
        .arg(dir.join(out))
        .env_remove("RAMSNAP_LOG");
    if let Some(log) = log {
        command.env("RAMSNAP_LOG", log);
    }
    Ended::of(&mut command)
}

#[test]
fn no_event_is_printed_unless_requested() {
    let dir = tempfile::tempdir().unwrap();
    for (out, log) in [("a", None), ("b", Some(""))] {
        let ended = dump(dir.path(), out, &[], log);
        assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""));
    }
}

#[test]
fn more_verbose_prints_more() {
    let dir = tempfile::tempdir().unwrap();
    let quiet = dump(dir.path(), "a", &["-v"], None);
    let loud = dump(dir.path(), "b", &["-v", "-v"], None);
    assert_eq!((quiet.code, loud.code), (Some(0), Some(0)));
    assert!(!quiet.err.contains("staged"), "{}", quiet.err);
    for text in [
        "ramsnap: file staged (dest: ",
        "ramsnap: snapshot staged (dest: ",
        "ram size: 8388608",
        "engine: ",
    ] {
        assert!(loud.err.contains(text), "no {text:?} in {}", loud.err);
    }
    // Plain lines, without times, levels and modules.
    let is_plain = |line: &str| line.starts_with("ramsnap: ");
    assert!(loud.err.lines().all(is_plain), "{}", loud.err);
    for text in ["DEBUG", "atomic_file", "="] {
        assert!(!loud.err.contains(text), "{text:?} in {}", loud.err);
    }
    assert!(!loud.err.contains("S3cr3t"), "{}", loud.err);
}

#[test]
fn the_variable_overrides_the_option() {
    let dir = tempfile::tempdir().unwrap();
    let ended = dump(dir.path(), "a", &["-vvv"], Some("atomic_file=debug"));
    assert!(ended.err.contains("atomic_file"), "{}", ended.err);
    assert!(!ended.err.contains("memory_writer"), "{}", ended.err);
    let ended = dump(dir.path(), "b", &[], Some("memory_writer=debug"));
    assert!(ended.err.contains("memory_writer"), "{}", ended.err);
}

#[test]
fn a_filter_that_is_none_is_wrong_usage() {
    let dir = tempfile::tempdir().unwrap();
    let ended = dump(dir.path(), "a", &[], Some("sparse_file=\u{1b}[31m"));
    assert_eq!(ended.code, Some(2), "{}", ended.err);
    assert!(ended.err.contains("RAMSNAP_LOG"), "{}", ended.err);
    assert!(!ended.err.contains('\u{1b}'), "{}", ended.err);
    assert!(!dir.path().join("a").exists());
}

#[test]
fn events_have_no_color_and_no_control_characters() {
    let dir = tempfile::tempdir().unwrap();
    let ended = dump(dir.path(), "a\u{1b}[31m\nb", &["-vv"], None);
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    assert!(ended.err.contains("a\\u{1b}[31m\\nb"), "{}", ended.err);
    assert!(!ended.err.contains('\u{1b}'), "{}", ended.err);
}
