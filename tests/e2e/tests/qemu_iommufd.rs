//! QEMU's iommufd backend (8.2 and newer) with the main job: by descriptors that it is given, since it opens a device's
//! own node only where that is a character device; and by container as ever. The QEMUs are those of newer Debian
//! releases.
//!
//! What QEMU asked of the iommufd stands in its trace, a line for each ioctl with its result in parentheses.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use e2e::boot::{
    DISK_MEGABYTES, READ_AND_WRITE, ended_well, ends_healthy, kill_in_the_middle_of_io, no_warnings, nvme,
    reads_and_writes, same_from_both_sides, start,
};
use e2e::guest::{BDF, Backend, Machine, Ram, Viommu, kept_alive};
use e2e::image::Image;
use e2e::monitor::Monitor;
use e2e::newer_qemu::{NEWEST, STABLE, of_release, with_option};
use e2e::server::Run;
use e2e::{PATIENCE, skipped, wait_until};
use serde_json::{Value, json};

/// The engines of a guest with an IOMMU of its own.
const ENGINES: [&str; 2] = ["0000:c2:00.0", "0000:c3:00.0"];

/// What there is, or else it is said that the test does not run.
fn or_skipped(qemu: Result<PathBuf, String>) -> Option<PathBuf> {
    qemu.inspect_err(|reason| skipped(reason)).ok()
}

/// A traced PC of that QEMU.
fn pc(qemu: PathBuf, ram: Ram, backend: Backend, jobs: &'static str) -> Machine {
    Machine { qemu: Some(qemu), backend, traced: true, ..Machine::new("pc", ram, jobs) }
}

/// The lines of QEMU's trace that name `event`.
fn traced(image: &Image, event: &str) -> Result<Vec<String>> {
    let trace = std::fs::read_to_string(Machine::trace_log(image))?;
    Ok(trace.lines().filter(|line| line.contains(event)).map(str::to_owned).collect())
}

/// The result that ends a line of the trace.
fn succeeded(line: &str) -> bool {
    line.ends_with("(0)")
}

/// The guest reads the disk as the host wrote it, writes a pattern, and the host finds it.
fn disk_is_the_same_from_both_sides(release: &'static str, ram: Ram, backend: Backend, options: &[&str]) -> Result<()> {
    let Some(qemu) = or_skipped(of_release(release)) else { return Ok(()) };
    reads_and_writes(&pc(qemu, ram, backend, READ_AND_WRITE), options, "").map(drop)
}

#[test]
fn qemu_with_both_descriptors_and_private_ram_reads_and_writes_the_disk() -> Result<()> {
    disk_is_the_same_from_both_sides(STABLE, Ram::Private, Backend::IommufdPassed, &[])
}

#[test]
fn qemu_with_both_descriptors_and_memfd_ram_reads_and_writes_the_disk() -> Result<()> {
    disk_is_the_same_from_both_sides(STABLE, Ram::Memfd, Backend::IommufdPassed, &[])
}

#[test]
fn qemu_that_opens_the_iommufd_reads_and_writes_the_disk() -> Result<()> {
    disk_is_the_same_from_both_sides(STABLE, Ram::Private, Backend::Iommufd, &[])
}

#[test]
fn qemu_10_with_a_container_reads_and_writes_the_disk() -> Result<()> {
    disk_is_the_same_from_both_sides(STABLE, Ram::Private, Backend::Container, &[])
}

#[test]
fn qemu_10_with_a_container_of_the_iommufd_flavour_reads_and_writes_the_disk() -> Result<()> {
    disk_is_the_same_from_both_sides(STABLE, Ram::Memfd, Backend::Container, &["--container", "iommufd"])
}

#[test]
fn newest_qemu_with_both_descriptors_and_private_ram_reads_and_writes_the_disk() -> Result<()> {
    disk_is_the_same_from_both_sides(NEWEST, Ram::Private, Backend::IommufdPassed, &[])
}

#[test]
fn newest_qemu_with_a_container_reads_and_writes_the_disk() -> Result<()> {
    disk_is_the_same_from_both_sides(NEWEST, Ram::Memfd, Backend::Container, &[])
}

#[test]
fn newest_qemu_maps_memfd_ram_by_its_file_and_reads_and_writes_the_disk() -> Result<()> {
    let Some(qemu) = or_skipped(of_release(NEWEST)) else { return Ok(()) };
    let image = Image::random(DISK_MEGABYTES)?;
    let before = image.sha256()?;
    let machine = pc(qemu, Ram::Memfd, Backend::IommufdPassed, READ_AND_WRITE);
    ends_healthy(start(&machine, &image, &[], "")?, &image, &before)?;
    let maps = traced(&image, "iommufd_backend_map_file_dma")?;
    ensure!(!maps.is_empty() && maps.iter().all(|line| succeeded(line)), "not by its file: {maps:#?}");
    Ok(())
}

/// QEMU opens a device's own node only where that is a character device; ours is a file of a FUSE mount.
#[test]
fn qemu_that_is_to_open_the_device_itself_says_that_it_cannot_and_leaves_nothing() -> Result<()> {
    let Some(qemu) = or_skipped(of_release(STABLE)) else { return Ok(()) };
    let image = Image::random(DISK_MEGABYTES)?;
    let machine = pc(qemu, Ram::Private, Backend::IommufdOpened, "read");
    let mut run = Run::start(&nvme(BDF, &image, ""), &kept_alive(machine.command(&image)?))?;
    ensure!(run.wait_for("ended ")? == "1", "QEMU went on");
    run.wait_until_empty(PATIENCE)?;
    let said = std::fs::read_to_string(Machine::qemu_log(&image))?;
    ensure!(said.contains("Failed to open /dev/vfio/devices/vfio0"), "{said}");
    Ok(())
}

/// The page table that the only device is attached to.
fn page_table(status: &Value) -> Result<&Value> {
    let tables = status["ioases"][0]["hwpts"].as_array().context("hwpts")?;
    tables.iter().find(|table| table["devices"] == json!([BDF])).with_context(|| format!("none: {status:#}"))
}

/// QEMU asks IOMMU_GET_HW_INFO whether the IOMMU tracks dirty pages, and if so makes a page table that does.
#[test]
fn qemu_that_measures_what_gets_dirty_has_its_page_table_track_it_meanwhile() -> Result<()> {
    let Some(qemu) = or_skipped(of_release(STABLE)) else { return Ok(()) };
    let image = Image::random(DISK_MEGABYTES)?;
    let machine = Machine { monitored: true, ..pc(qemu, Ram::Private, Backend::IommufdPassed, "read,more") };
    let mut run = start(&machine, &image, &[], "")?;
    let mut monitor = Monitor::connect(&Machine::monitor(&image))?;
    run.wait_for("guest: more")?;
    let tracks = |run: &Run| anyhow::Ok(page_table(&run.status()?)?["dirty_tracking"] == true);
    ensure!(!tracks(&run)?, "nobody has asked for it");
    monitor.execute("calc-dirty-rate", json!({ "calc-time": 1, "mode": "dirty-bitmap" }))?;
    wait_until("dirty tracking", PATIENCE, || Ok(tracks(&run)?.then_some(())))?;
    wait_until("its end", PATIENCE, || Ok((!tracks(&run)?).then_some(())))?;
    // As of Linux's vfio-pci: a device that cannot be migrated holds up a migration, and nothing else.
    let refusal = monitor.execute("migrate", json!({ "uri": "exec:cat >/dev/null" })).err().context("it migrates")?;
    ensure!(refusal.to_string().contains("migration is not supported in kernel"), "{refusal}");
    run.tell("write,read")?;
    ended_well(&run.finish()?, &image)?;
    let calls = traced(&image, "iommufd_backend_set_dirty")?;
    ensure!(calls.len() == 2 && calls.iter().all(|line| succeeded(line)), "{calls:#?}");
    no_warnings(&Machine::qemu_log(&image))
}

#[test]
fn second_device_behind_another_iommu_gets_a_page_table_of_its_own_over_the_same_ioas() -> Result<()> {
    let Some(qemu) = or_skipped(of_release(STABLE)) else { return Ok(()) };
    let (image, second) = (Image::random(DISK_MEGABYTES)?, Image::random(DISK_MEGABYTES)?);
    let mut machine = pc(qemu, Ram::Memfd, Backend::IommufdPassed, "read,write,read,errors,pause");
    machine.devices.push("0000:c2:00.0".to_owned());
    let before = image.sha256()?;
    let options = [nvme(BDF, &image, ""), nvme("0000:c2:00.0", &second, ",iommu=b,coherent=off")].concat();
    let mut run = Run::start(&options, &machine.command(&image)?)?;
    run.wait_for("guest: pause")?;
    let status = run.status()?;
    ensure!(status["ioases"].as_array().map(Vec::len) == Some(1), "one address space: {status:#}");
    let tables = status["ioases"][0]["hwpts"].as_array().context("hwpts")?;
    let devices: Vec<_> = tables.iter().map(|table| &table["devices"]).collect();
    ensure!(devices == [&json!([BDF]), &json!(["0000:c2:00.0"])], "{status:#}");
    ensure!(status["store"]["held_bytes"] == status["ioases"][0]["mapped_bytes"], "held more than once: {status:#}");
    run.tell("")?;
    ends_healthy(run, &image, &before).map(drop)
}

#[test]
fn unplugged_device_leaves_nothing_and_comes_back_by_another_descriptor() -> Result<()> {
    let Some(qemu) = or_skipped(of_release(STABLE)) else { return Ok(()) };
    let image = Image::random(DISK_MEGABYTES)?;
    let before = image.sha256()?;
    let jobs = "read,unplug,plug,read,write,read";
    let mut machine = Machine { monitored: true, ..pc(qemu, Ram::Private, Backend::IommufdPassed, jobs) };
    machine.spare_nodes = vec![BDF.to_owned()];
    let mut run = start(&machine, &image, &[], "")?;
    let mut monitor = Monitor::connect(&Machine::monitor(&image))?;
    run.wait_for("guest: unplug")?;
    monitor.execute("device_del", json!({ "id": Machine::DEVICE }))?;
    monitor.wait_for_device("DEVICE_DELETED", Machine::DEVICE)?;
    run.tell("")?;
    run.wait_for("guest: plug")?;
    let status = run.status()?;
    ensure!(
        status["ioases"] == json!([]) && status["objects"] == 0 && status["store"]["held_bytes"] == 0,
        "{status:#}"
    );
    let fd = Backend::device_fd(1).to_string();
    let device = json!({ "driver": "vfio-pci", "id": Machine::DEVICE, "iommufd": "iommufd0", "fd": fd });
    monitor.execute("device_add", device)?;
    run.tell("")?;
    let report = run.finish()?;
    ended_well(&report, &image)?;
    same_from_both_sides(&report, &image, &before)?;
    // So QEMU 10 says of each device of an iommufd that goes, where there is no KVM.
    let said = std::fs::read_to_string(Machine::qemu_log(&image))?;
    ensure!(said.lines().all(|line| line.ends_with(": KVM VFIO device isn't created yet")), "{said}");
    Ok(())
}

#[test]
fn qemu_killed_in_the_middle_of_io_leaves_nothing_held() -> Result<()> {
    let Some(qemu) = or_skipped(of_release(STABLE)) else { return Ok(()) };
    for (backend, ram) in [(Backend::IommufdPassed, Ram::Private), (Backend::Iommufd, Ram::Memfd)] {
        kill_in_the_middle_of_io(&pc(qemu.clone(), ram, backend, "fill"))?;
    }
    Ok(())
}

/// What engines tried in vain, as the guest's program had them, and what QEMU asks for on trial.
fn only_engines_were_refused(status: &Value) -> Result<()> {
    for failure in status["failures"].as_array().context("failures")? {
        let text = |key: &str| failure[key].as_str().unwrap_or_default();
        let expected = match text("op") {
            "DMA" => ENGINES.iter().any(|engine| text("reason").starts_with(engine)),
            "IOMMU_IOAS_IOVA_RANGES" => text("errno") == "EMSGSIZE",
            "VFIO_DEVICE_FEATURE" => text("errno") == "ENOTTY",
            // The registers of a device, which QEMU would have the others reach; and unmaps all the same.
            "IOMMU_IOAS_MAP" => text("reason").contains("DeviceRegion"),
            "IOMMU_IOAS_UNMAP" => text("errno") == "ENOENT",
            // QEMU disables interrupts that it has not enabled.
            op => op == "VFIO_DEVICE_SET_IRQS",
        };
        ensure!(expected, "{failure:#}");
    }
    Ok(())
}

/// QEMU 11 would have each device reach the mapped registers of the others, by a dma-buf or else by a map, and says each
/// time that neither is possible.
fn warned_of_registers_only(image: &Image) -> Result<()> {
    let log = std::fs::read_to_string(Machine::qemu_log(image))?;
    let known = ["VFIO dma-buf not supported", "PCI BAR?", "= -14 (Bad address)", "peer-to-peer transactions on BARs"];
    let others: Vec<_> = log.lines().filter(|line| !known.iter().any(|words| line.contains(words))).collect();
    ensure!(others.is_empty(), "QEMU warned: {others:#?}");
    Ok(())
}

/// A guest that hands its own first-stage page tables to the device's IOMMU: the kernel's drivers, and then
/// `guest-shadowed`, whose engines find at each step what the guest's tables say and nothing else. QEMU maps the guest's
/// RAM alone, once.
#[test]
fn guest_with_nested_page_tables_reaches_what_they_say() -> Result<()> {
    let Some(qemu) = or_skipped(with_option(NEWEST, "intel-iommu", "fsts")) else { return Ok(()) };
    let image = Image::random(DISK_MEGABYTES)?;
    let before = image.sha256()?;
    let jobs = "read,write,read,ioat,engines,domains,errors";
    let (kind, viommu, program) = ("q35", Some(Viommu::Nested), Some("guest-shadowed"));
    let mut machine = Machine { kind, viommu, program, ..pc(qemu, Ram::Memfd, Backend::IommufdPassed, jobs) };
    machine.devices.extend(ENGINES.map(str::to_owned));
    let engines = ENGINES.map(|engine| ["--device".to_owned(), format!("ioat@{engine},vtd=on")]).concat();
    let options = [nvme(BDF, &image, ",vtd=on").as_slice(), &engines].concat();
    let mut run = Run::start(&options, &machine.command(&image)?)?;
    run.wait_for("guest: free")?;
    let maps = |image| anyhow::Ok(traced(image, "iommufd_backend_map_")?.iter().filter(|line| succeeded(line)).count());
    let mapped = maps(&image)?;
    run.tell("")?;
    loop {
        let step = run.wait_for("guest: step ")?;
        run.tell("")?;
        if step == "ended" {
            break;
        }
    }
    ensure!(maps(&image)? == mapped, "QEMU mapped what the guest maps");
    only_engines_were_refused(&run.status()?)?;
    for kind in ["identity", "DMA"] {
        run.wait_for(&format!("guest: type {kind}"))?;
        run.tell("")?;
    }
    let report = run.finish()?;
    ended_well(&report, &image)?;
    same_from_both_sides(&report, &image, &before)?;
    ensure!(report.value("guest: given-back")? == "2", "not two channels again: {}", report.lines.join("\n"));
    warned_of_registers_only(&image)?;
    let tables = traced(&image, "iommufd_backend_alloc_hwpt")?;
    // IOMMU_HWPT_DATA_VTD_S1.
    ensure!(tables.iter().any(|line| line.contains("hwpt_type=1 ")), "no nested page table: {tables:#?}");
    let invalidations = traced(&image, "iommufd_backend_invalidate_cache")?;
    ensure!(!invalidations.is_empty(), "nothing was invalidated");
    let failed: Vec<_> = [tables, invalidations].concat().into_iter().filter(|line| !succeeded(line)).collect();
    ensure!(failed.is_empty(), "{failed:#?}");
    Ok(())
}
