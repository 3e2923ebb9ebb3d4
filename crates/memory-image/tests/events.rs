//! Events of the feature `tracing`.
#![cfg(all(feature = "tracing", target_os = "linux"))]

use memory_image::{Chain, MappedChain};
use test_events::captured;

const SIZE: usize = 1 << 20;

#[test]
fn a_chain_reports_its_images_its_holes_and_its_mappings() {
    let dir = tempfile::tempdir().unwrap();
    let (full, diff) = (dir.path().join("full"), dir.path().join("a\u{1b}[31m"));
    std::fs::write(&full, b"S3cr3t!!".repeat(SIZE / 8)).unwrap();
    // Without a hole, as a copy that filled them.
    std::fs::write(&diff, b"S3cr3t!!".repeat(SIZE / 8)).unwrap();
    let events = captured(|| {
        let mut chain = Chain::open_raw(&full, 4096).unwrap();
        let why = chain.push_trusting_holes(&diff).unwrap();
        assert!(why.is_some());
        let mapped = MappedChain::options().max_mappings(1);
        assert!(mapped.map(&chain).unwrap().copied() > 0);
    });
    for text in [
        "DEBUG memory_image: image added to the chain",
        "INFO memory_image: holes are not trusted, and are taken for clean pages",
        "INFO memory_image: chain mapped: short runs were copied",
        "a\\u{1b}[31m",
        &format!("{full:?}"),
    ] {
        assert!(events.contains(text), "no {text:?} in {events}");
    }
    assert!(
        !events.contains("S3cr3t") && !events.contains('\u{1b}'),
        "{events}"
    );
}
