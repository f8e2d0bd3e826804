//! The service of a model: one address for all its ready replicas.

use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;

use super::{metadata, pod, selector_labels};
use crate::api::ConversationModel;

/// Port of the service; clients write `http://<model>.<namespace>`.
const PORT: i32 = 80;

/// The service `<model>`.
pub fn service(model: &ConversationModel) -> Service {
    let name = model.name_any();
    Service {
        metadata: metadata(model, name.clone(), None),
        spec: Some(ServiceSpec {
            type_: Some("ClusterIP".into()),
            selector: Some(selector_labels(&name)),
            ports: Some(vec![ServicePort {
                name: Some("http".into()),
                port: PORT,
                protocol: Some("TCP".into()),
                target_port: Some(IntOrString::String(pod::RUNTIME_PORT_NAME.into())),
                ..ServicePort::default()
            }]),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}
