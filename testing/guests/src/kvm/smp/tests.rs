//! A machine whose vCPUs run in threads is paused in the middle of their work, and continues as
//! another machine.

use page_reader::PageReader;
use test_machine::needs;

use super::*;
use crate::oracle::Oracle;

const RAM: u64 = 16 << 20;

fn verdict(vcpu: usize, steps: u64) -> Verdict {
    Oracle::new(layout(RAM), seed(vcpu)).verdict_at(steps)
}

fn booted() -> Arc<Smp> {
    let machine = Smp::new(RAM).unwrap();
    machine.boot().unwrap();
    Arc::new(machine)
}

#[test]
fn each_vcpu_keeps_the_ledger_of_its_half() {
    needs!(Kvm);
    let machine = booted();
    machine.work_until([3000, 5000]).unwrap();
    assert_eq!(machine.steps(), [3000, 5000]);
    let expected = [verdict(0, 3000), verdict(1, 5000)];
    assert_eq!(machine.check().unwrap(), expected);
    assert_ne!(expected[0].digest, verdict(1, 3000).digest);
}

#[test]
fn paused_machine_continues_as_another() {
    needs!(Kvm);
    let machine = booted();
    let running = Running::start(&machine, 5_000).unwrap();
    let mut ram = vec![0; RAM as usize];
    let mut oracles = [0, 1].map(|vcpu| Oracle::new(layout(RAM), seed(vcpu)));
    for _ in 0..test_machine::rounds(5, 20) {
        let before = machine.steps();
        let worked = |now: &[u64; 2]| (0..VCPUS).all(|it| now[it] >= before[it] + 100);
        while !worked(&machine.steps()) {
            running.check().unwrap();
            thread::yield_now();
        }
        let paused = running.pause().unwrap();
        let (steps, states) = (paused.steps(), paused.states().unwrap());
        machine.ram().read_at(0, &mut ram).unwrap();
        assert_eq!(machine.steps(), steps, "no vCPU runs");
        paused.resume();

        let new = Smp::new(RAM).unwrap();
        new.ram().write_at(0, &ram).unwrap();
        new.set_states(&states).unwrap();
        assert_eq!(new.steps(), steps);
        let goals = steps.map(|steps| steps + 500);
        new.work_until(goals).unwrap();
        let expected = [0, 1].map(|vcpu| oracles[vcpu].verdict_at(goals[vcpu]));
        assert_eq!(new.check().unwrap(), expected);
    }
    running.end().unwrap();
}

#[test]
fn an_error_of_a_vcpu_is_reported_at_the_end() {
    needs!(Kvm);
    let machine = booted();
    machine
        .front(&machine.halves[1])
        .store(front::CURSOR, 1 << 40);
    let running = Running::start(&machine, 200_000).unwrap();
    while running.check().is_ok() {
        thread::yield_now();
    }
    drop(running.pause().unwrap());
    let error = running.end().unwrap_err().to_string();
    assert!(error.contains("Shutdown"), "{error}");
}
