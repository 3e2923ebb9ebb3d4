//! The engine that `Engine::Auto` chooses, and the reason.

use std::fs::File;
#[cfg(target_os = "linux")]
use std::fs::OpenOptions;

#[cfg(target_os = "linux")]
use sparse_file::Capabilities;
use sparse_file::{Engine, EngineReason, WriteOptions};

const LARGE: u64 = 8 << 20;

fn choice(file: &File, bytes: u64) -> sparse_file::EngineChoice {
    WriteOptions::new().engine_choice(file, bytes)
}

#[test]
fn small_job_is_written_by_pwrite() {
    let file = tempfile::tempfile().unwrap();
    let choice = choice(&file, 1 << 20);
    assert_eq!(choice.engine, Engine::Pwrite);
    assert!(matches!(choice.because, EngineReason::SmallJob), "{choice}");
    assert!(!choice.is_fallback());
}

#[test]
fn requested_engine_is_returned_as_requested() {
    let file = tempfile::tempfile().unwrap();
    for engine in Engine::ALL.iter().filter(|one| **one != Engine::Auto) {
        let choice = WriteOptions::new()
            .engine(*engine)
            .engine_choice(&file, LARGE);
        assert_eq!(choice.engine, *engine);
        assert!(matches!(choice.because, EngineReason::Requested));
        assert!(!choice.is_fallback());
    }
}

#[test]
#[cfg(target_os = "linux")]
fn file_without_direct_io_is_written_by_pwrite() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let appending = OpenOptions::new().append(true).open(file.path()).unwrap();
    let choice = choice(&appending, LARGE);
    assert_eq!(choice.engine, Engine::Pwrite);
    let EngineReason::NoDirectIo { source } = &choice.because else {
        panic!("{choice}");
    };
    assert!(choice.is_fallback());
    let text = choice.to_string();
    assert!(text.contains("Pwrite") && text.contains("direct I/O"));
    assert!(text.contains(&source.to_string()), "{text}");
    assert!(text.contains("open for writing at any offset"), "{text}");
}

#[test]
#[cfg(target_os = "linux")]
fn direct_io_makes_the_ring_or_the_threads_the_choice() {
    let dir = std::env::temp_dir();
    if Capabilities::probe(&dir).unwrap().direct_io.is_none() {
        return;
    }
    let choice = choice(&tempfile::tempfile_in(dir).unwrap(), LARGE);
    match &choice.because {
        EngineReason::Fastest => assert_eq!(choice.engine, Engine::IoUring),
        EngineReason::NoRing { .. } => assert_eq!(choice.engine, Engine::Threads),
        _ => panic!("{choice}"),
    }
}
