//! Records of the crate `log`, which a program without a subscriber of `tracing` receives.
#![cfg(feature = "tracing")]

use std::ops::ControlFlow;
use std::sync::Mutex;

use log::{LevelFilter, Log, Metadata, Record};
use sparse_file::{Engine, WriteOptions, write_runs};

/// As in a VMM that uses `log`: Firecracker, Cloud Hypervisor.
struct Logger;

static RECORDS: Mutex<Vec<String>> = Mutex::new(Vec::new());

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let text = format!("{} {}: {}", record.level(), record.target(), record.args());
        RECORDS.lock().unwrap().push(text);
    }

    fn flush(&self) {}
}

// The only test of this binary: another one could set a subscriber.
#[test]
fn without_a_subscriber_events_become_log_records() {
    log::set_logger(&Logger).unwrap();
    log::set_max_level(LevelFilter::Debug);
    let file = tempfile::tempfile().unwrap();
    let options = WriteOptions::new().engine(Engine::Pwrite);
    write_runs(&file, [0..3], &[1u8, 2, 3][..], &options, &mut |_| {
        ControlFlow::Continue(())
    })
    .unwrap();
    let records = RECORDS.lock().unwrap().join("\n");
    assert!(
        records.starts_with("DEBUG sparse_file: engine chosen"),
        "{records}"
    );
    assert!(records.contains("engine=Pwrite"), "{records}");
}
