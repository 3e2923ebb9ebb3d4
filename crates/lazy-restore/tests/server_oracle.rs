//! Random accesses of a client of a page server, compared with a model of its RAM.
#![cfg(target_os = "linux")]

mod support;

use lazy_restore::{PageServer, VmEnd};
use page_client::{Client, Memory};
use random::Random;
use support::served::{Listening, MIB, PAGE};
use test_images::Images;
use test_machine::{needs, rounds};

/// Not a test: the process of the client.
#[test]
fn page_client() {
    page_client::run();
}

const SIZE: u64 = 4 * MIB;
const PAGES: u64 = SIZE / PAGE;

fn access(random: &mut Random, client: &mut Client, ram: &mut [u8]) {
    let page = random.below(PAGES);
    let at = page * PAGE + random.below(PAGE);
    match random.below(4) {
        0 => {
            let byte = random.below(256) as u8;
            client.write(at, byte);
            ram[at as usize] = byte;
        }
        1 => {
            // Of one region: the client discards addresses that follow each other.
            let pages = 1 + random.below(8.min(MIB / PAGE - page % (MIB / PAGE)));
            client.remove(page * PAGE, pages * PAGE);
            ram[(page * PAGE) as usize..][..(pages * PAGE) as usize].fill(0);
        }
        _ => {
            let len = 1 + random.below(5 * PAGE).min(SIZE - at - 1);
            let bytes = client.read(at, len).unwrap();
            assert!(
                bytes == ram[at as usize..][..len as usize],
                "{len} at {at:#x}"
            );
        }
    }
}

#[test]
fn random_accesses_find_what_the_model_has() {
    needs!(Userfaultfd);
    for seed in 0..rounds(4, 200) {
        let mut random = Random::seeded(seed);
        let run = |random: &mut Random| {
            let start = random.below(PAGES - 1);
            start..start + 1 + random.below(PAGES - start)
        };
        let images = Images::new(SIZE, PAGE)
            .with([run(&mut random)])
            .with([run(&mut random)]);
        let options = PageServer::options()
            .prefetch(seed % 2 == 0)
            .handlers(1 + random.below(4) as usize)
            .fault_around(PAGE << random.below(6));
        let listening = Listening::new(&images, &options);
        let mut memory = Memory::private([MIB; 4]);
        memory.registered = seed % 3 > 0;
        let (mut client, vm) = listening.serve_client(&memory);
        let mut ram = images.ram.clone();
        for _ in 0..100 {
            access(&mut random, &mut client, &mut ram);
        }
        if random.below(2) == 0 {
            vm.complete();
            assert!(
                matches!(vm.wait(), VmEnd::Filled),
                "seed {seed}: {:?}",
                vm.wait()
            );
        }
        assert!(client.read(0, SIZE).unwrap() == ram, "seed {seed}");
    }
}
