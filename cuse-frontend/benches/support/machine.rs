//! A server with devices, as a bench wants it.

use std::sync::Arc;

use compat::device::DeviceModel;
use cuse_frontend::{DeviceSpec, Server, ServerOptions};
use hwpt::DeviceProperties;

/// A server with a device of each model behind one IOMMU. The first of them is in group 0 and is `/dev/vfio/devices/vfio0`.
pub(crate) fn machine(
    options: ServerOptions,
    properties: &DeviceProperties,
    models: impl IntoIterator<Item = Arc<dyn DeviceModel>>,
) -> Result<Arc<Server>, String> {
    let server = Server::new(options);
    for (group, model) in (0..).zip(models) {
        let bdf = format!("0000:c1:{group:02x}.0").parse().map_err(|error| format!("{error}"))?;
        let spec = DeviceSpec { bdf, group, noiommu: false, properties: properties.clone(), model };
        server.add_device(spec).map_err(|error| error.to_string())?;
    }
    Ok(server)
}
