//! Chains and guests of the tests.

// Every test file compiles its own copy of this module and uses a part of it.
#![allow(dead_code, unreachable_pub)]

pub mod lazy_images;
pub mod regions;
pub mod served;

use memory_image::Chain;
use test_images::Images;

/// Opens the chain of these images.
pub fn open_chain(images: &Images) -> Chain {
    let mut chain = Chain::open_raw(images.path(0), images.page()).unwrap();
    for (path, runs) in &images.layers()[1..] {
        chain.push_pages(path, runs.iter().cloned()).unwrap();
    }
    chain
}
