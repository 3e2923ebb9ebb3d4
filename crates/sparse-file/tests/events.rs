//! Events of the feature `tracing`.
#![cfg(all(feature = "tracing", target_os = "linux"))]

mod support;

use std::fs::OpenOptions;

use sparse_file::{Engine, WriteOptions, extents, grow, write_runs};
use support::go_on;
use test_events::captured;

const LEN: u64 = 2 << 20;
const SECRET: [u8; 8] = *b"S3cr3t!!";

/// Writes memory that is full of `SECRET`, and returns the events.
fn events_of_write(options: &WriteOptions, len: u64) -> String {
    let ram = SECRET.repeat(LEN as usize / SECRET.len());
    let file = tempfile::tempfile().unwrap();
    grow(&file, LEN).unwrap();
    captured(|| {
        let written = write_runs(&file, [0..len], ram.as_slice(), options, &mut go_on);
        assert_eq!(written.unwrap(), len);
    })
}

#[test]
fn a_write_reports_the_engine_and_the_reason() {
    let file = tempfile::tempfile().unwrap();
    let options = WriteOptions::new();
    for len in [4096, LEN] {
        let choice = options.engine_choice(&file, len);
        let events = events_of_write(&options, len);
        assert!(events.contains(&format!("{:?}", choice.engine)), "{events}");
        assert!(events.contains(&choice.because.to_string()), "{events}");
    }
    let events = events_of_write(&options.engine(Engine::Pwrite), LEN);
    assert!(
        events.contains("DEBUG") && events.contains("Pwrite"),
        "{events}"
    );
}

#[test]
fn a_file_without_direct_io_is_reported_with_the_reason() {
    // A memfd of huge pages or tmpfs would accept direct I/O; /dev/null is no regular file.
    let null = OpenOptions::new().write(true).open("/dev/null").unwrap();
    let ram = vec![7; LEN as usize];
    let write = |options: &WriteOptions| {
        captured(|| {
            let written = write_runs(&null, [0..LEN], ram.as_slice(), options, &mut go_on);
            assert_eq!(written.unwrap(), LEN);
        })
    };
    let events = write(&WriteOptions::new());
    assert!(events.contains("INFO") && events.contains("a slower engine is used"));
    assert!(events.contains("not a regular file"), "{events}");
    let events = write(&WriteOptions::new().engine(Engine::Threads));
    assert!(events.contains("INFO") && events.contains("direct I/O is not available"));
    assert!(events.contains("not a regular file"), "{events}");
}

#[test]
fn holes_that_are_not_trusted_are_reported() {
    let dir = std::fs::File::open("/proc/self/status").unwrap();
    let events = captured(|| assert!(extents(&dir).is_ok()));
    assert!(
        events.contains("INFO") && events.contains("holes are not trusted"),
        "{events}"
    );
    assert!(events.contains("known to report holes"), "{events}");
}

#[test]
fn no_event_contains_written_bytes() {
    for engine in Engine::ALL {
        let options = WriteOptions::new().engine(*engine);
        if matches!(engine, Engine::IoUring) {
            let file = tempfile::tempfile().unwrap();
            let auto = WriteOptions::new().engine_choice(&file, LEN);
            if auto.engine != Engine::IoUring {
                continue;
            }
        }
        let events = events_of_write(&options, LEN);
        assert!(!events.is_empty());
        assert!(!events.contains("S3cr3t"), "{events}");
    }
}
