//! DMA that waits for pages: a client maps what is missing and answers, or refuses, or never answers.

use std::sync::Arc;
use std::thread;

use hwpt::{DmaCause, FaultQueue, FaultRoute, Group, Permission, Read, RequestFlags, Response};
use ioas::{Access, Iova};

use crate::world::{World, rw, server};

const PAGE: u64 = 4096;

/// Waits for the next group.
fn next(queue: &FaultQueue) -> (u32, u64, Permission) {
    loop {
        if let Read::Group { cookie, device, requests } = queue.read(1) {
            assert_eq!((device, requests[0].flags), (7, RequestFlags::LAST_PAGE));
            return (cookie, requests[0].address, requests[0].permission);
        }
        thread::yield_now();
    }
}

#[test]
fn dma_that_misses_waits_for_its_pages_and_goes_on_where_it_was() {
    let world = World::new();
    world.map_shared(0, PAGE, rw());
    let (_group, device) = world.attached(&server());
    let queue = Arc::new(FaultQueue::default());
    device.set_fault_route(Some(FaultRoute::new(&queue, 7)));
    let data: Vec<u8> = (0..3 * PAGE).map(|index| (index / 3) as u8).collect();
    thread::scope(|scope| {
        let dma = scope.spawn(|| device.dma().write(Iova(0x80), &data[..2 * PAGE as usize + 0x100]));
        for missing in [PAGE, 2 * PAGE] {
            let (cookie, address, permission) = next(&queue);
            assert_eq!((address, permission), (missing, Permission::WRITE));
            world.map_shared(missing, PAGE, rw());
            assert!(queue.respond(cookie, Response::Success));
        }
        dma.join().expect("no panic").expect("every page has come");
    });
    let mut back = vec![0; 2 * PAGE as usize + 0x100];
    device.dma().read(Iova(0x80), &mut back).expect("mapped");
    assert!(back == data[..back.len()]);
    assert!(world.faults.take().is_empty());
}

#[test]
fn dma_whose_page_is_refused_is_aborted() {
    let world = World::new();
    let (_group, device) = world.attached(&server());
    let queue = Arc::new(FaultQueue::default());
    device.set_fault_route(Some(FaultRoute::new(&queue, 7)));
    thread::scope(|scope| {
        let dma = scope.spawn(|| device.dma().translate(Iova(0x5008), 8, Access::READ));
        let (cookie, address, permission) = next(&queue);
        assert_eq!((address, permission), (0x5000, Permission::READ));
        assert!(queue.respond(cookie, Response::Invalid));
        assert_eq!(dma.join().expect("no panic").expect_err("refused").cause, DmaCause::Refused);
    });
}

#[test]
fn dma_that_waits_is_aborted_when_its_device_is_reset_or_its_route_ends() {
    let world = World::new();
    let (_group, device) = world.attached(&server());
    let queue = Arc::new(FaultQueue::default());
    device.set_fault_route(Some(FaultRoute::new(&queue, 7)));
    for ends in [false, true] {
        thread::scope(|scope| {
            let dma = scope.spawn(|| device.dma().read(Iova(0), &mut [0; 8]));
            let (cookie, ..) = next(&queue);
            device.abort_page_requests(ends);
            assert_eq!(dma.join().expect("no panic").expect_err("aborted").cause, DmaCause::Refused);
            assert!(!queue.respond(cookie, Response::Success), "nobody waits for it any more");
        });
    }
    assert_eq!(device.dma().read(Iova(0), &mut [0; 8]).expect_err("no route").cause, DmaCause::Refused);
}

#[test]
fn dma_with_a_pasid_has_its_own_table_route_and_name_as_long_as_anybody_has_it() {
    let world = World::new();
    let (_group, device) = world.attached(&server());
    world.map_shared(0, PAGE, rw());
    let queue = Arc::new(FaultQueue::default());
    let five = device.of_pasid(5);
    assert!(Arc::ptr_eq(&five, &device.of_pasid(5)), "the same one");
    assert_eq!(
        device.dma().with_pasid(5).read(Iova(0), &mut [0]).expect_err("attached nowhere").cause,
        DmaCause::NotAttached
    );
    let seat = Group::new(1);
    seat.add_device(&five).expect("attached to nothing");
    world.list.attach(&seat).expect("fits");
    five.set_fault_route(Some(FaultRoute::new(&queue, 7)));
    device.dma().with_pasid(5).read(Iova(0), &mut [0]).expect("mapped");
    thread::scope(|scope| {
        let dma = scope.spawn(|| device.dma().with_pasid(5).read(Iova(0x7000), &mut [0; 8]));
        let (cookie, request) = loop {
            if let Read::Group { cookie, requests, .. } = queue.read(1) {
                break (cookie, requests[0]);
            }
            thread::yield_now();
        };
        assert_eq!((request.pasid, request.address), (5, 0x7000));
        assert_eq!(request.flags, RequestFlags::LAST_PAGE | RequestFlags::PASID_VALID);
        assert!(queue.respond(cookie, Response::Invalid));
        assert_eq!(dma.join().expect("no panic").expect_err("refused").cause, DmaCause::Refused);
    });
    world.list.detach(&seat).expect("attached");
    drop((seat, five));
    assert!(device.of_pasid(5).fault_route().is_none(), "forgotten with its last holder");
}
