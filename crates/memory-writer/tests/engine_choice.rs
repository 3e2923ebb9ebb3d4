//! The engine of a writer, and the reason for it.

use memory_writer::{Engine, EngineReason, MemoryWriter};

#[test]
fn a_writer_names_its_engine_and_why() {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("full.mem");
    let writer = MemoryWriter::open(&dest, 1 << 20, 4096).unwrap();
    let choice = writer.engine_choice();
    assert_eq!(choice.engine, Engine::Pwrite);
    assert!(matches!(choice.because, EngineReason::SmallJob), "{choice}");
    drop(writer);

    let options = MemoryWriter::options().engine(Engine::Threads);
    let writer = options.open(&dest, 1 << 30, 4096).unwrap();
    let choice = writer.engine_choice();
    assert_eq!(choice.engine, Engine::Threads);
    assert!(matches!(choice.because, EngineReason::Requested));
}
