//! One look at one model: observe → plan → apply → tell.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::runtime::controller::Action;
use kube::runtime::events::{Event, Recorder};
use kube::{Client, Resource, ResourceExt};

use crate::api::ConversationModel;
use crate::apply::{Applier, ApplyError};
use crate::conditions::{self, Facts};
use crate::desired::Images;
use crate::error::{Class, class_of};
use crate::observe::{ObserveError, observe};
use crate::plan::{Change, Plan, Wait, plan};
use crate::problem;
use crate::story;
use crate::telemetry::Metrics;

/// Watches tell of every change; this is the net below them.
const RESYNC: Duration = Duration::from_mins(5);
/// What stands in the way (a stranger's object, a quota) is not watched, so it is looked at again.
const BLOCKED_RETRY: Duration = Duration::from_secs(15);
/// A pod that starts may be stuck in a way that only its events tell, which are not watched.
const STARTING_RETRY: Duration = Duration::from_secs(5);
/// After an error that passes by itself.
const ERROR_RETRY: Duration = Duration::from_secs(3);
/// After an error of ours: it will not pass, but the log should not fill.
const BUG_RETRY: Duration = Duration::from_mins(1);

/// What every reconciliation needs.
pub struct Context {
    /// Connection to the API server.
    pub client: Client,
    /// Images for models that name none.
    pub images: Images,
    /// Writes events.
    pub recorder: Recorder,
    /// Counts.
    pub metrics: Metrics,
}

/// A look at a model did not come to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReconcileError {
    /// Looking failed.
    #[error(transparent)]
    Observe(#[from] ObserveError),
    /// A change was not taken.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The API server gave a namespaced object without a namespace.
    #[error("model {0} has no namespace; this operator only knows namespaced models")]
    NoNamespace(String),
}

impl ReconcileError {
    /// Who can do something about it.
    pub fn class(&self) -> Class {
        match self {
            Self::Observe(ObserveError::Read { source, .. }) => class_of(source),
            Self::Apply(error) => error.class(),
            Self::NoNamespace(_) => Class::Bug,
        }
    }
}

/// Brings the cluster one step nearer to what the model asks for.
pub async fn reconcile(
    model: Arc<ConversationModel>,
    context: Arc<Context>,
) -> Result<Action, ReconcileError> {
    let _timed = context.metrics.reconcile_seconds.start_timer();
    let name = model.name_any();
    let namespace = model.namespace().ok_or_else(|| ReconcileError::NoNamespace(name.clone()))?;
    let applier = Applier { client: &context.client, namespace: &namespace };

    let observed = observe(&context.client, &namespace, &model).await?;
    let plan = plan(&model, &observed, &context.images);
    let refused = context.carry_out(&applier, &model, &plan).await?;
    if plan.changes.contains(&Change::RemoveFinalizer) {
        return Ok(Action::await_change()); // There is nothing left to write a status to.
    }

    let facts = Facts {
        model: &model,
        observed: &observed,
        plan: &plan,
        refused: refused.as_deref(),
        images: &context.images,
    };
    let status = conditions::status(&facts, Timestamp::now());
    if model.status.as_ref() != Some(&status) {
        applier.write_status(&model, &status).await?;
        context.tell(&model, story::of_turn(model.status.as_ref(), &status)).await;
    }
    let blocked = is_blocked(&plan, refused.as_ref());
    let starting = observed.pods.values().any(problem::is_mute);
    Ok(Action::requeue(match (starting, blocked) {
        (true, _) => STARTING_RETRY,
        (false, true) => BLOCKED_RETRY,
        (false, false) => RESYNC,
    }))
}

/// When to look again after an error.
#[expect(clippy::needless_pass_by_value, reason = "the signature that the controller calls")]
pub fn on_error(
    model: Arc<ConversationModel>,
    error: &ReconcileError,
    context: Arc<Context>,
) -> Action {
    let class = error.class();
    context.metrics.error(class);
    let (name, namespace) = (model.name_any(), model.namespace().unwrap_or_default());
    match class {
        Class::Retry => tracing::info!(%namespace, model = %name, %error, "tried again soon"),
        Class::UserMustFix => tracing::warn!(%namespace, model = %name, %error, "needs the user"),
        Class::Bug => tracing::error!(%namespace, model = %name, %error, "a bug of the operator"),
    }
    Action::requeue(match class {
        Class::Retry => ERROR_RETRY,
        Class::UserMustFix => BLOCKED_RETRY,
        Class::Bug => BUG_RETRY,
    })
}

fn is_blocked(plan: &Plan, refused: Option<&String>) -> bool {
    let taken = |wait: &Wait| matches!(wait, Wait::NameTaken(..));
    refused.is_some() || plan.waits.iter().any(taken)
}

impl Context {
    /// Applies changes in order. What the user must fix does not stop the others (a volume that
    /// cannot grow is no reason to have no service) and is given back as a sentence.
    async fn carry_out(
        &self,
        applier: &Applier<'_>,
        model: &ConversationModel,
        plan: &Plan,
    ) -> Result<Option<String>, ApplyError> {
        let mut refused = None;
        for change in &plan.changes {
            match applier.apply(model, change).await {
                Ok(()) => {
                    self.metrics.change(change);
                    self.tell(model, Some(story::of_change(change))).await;
                }
                Err(error) if error.class() == Class::UserMustFix => {
                    self.metrics.error(Class::UserMustFix);
                    refused.get_or_insert_with(|| error.sentence());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(refused)
    }

    /// Writes an event. A lost event is a pity, never a reason to stop.
    async fn tell(&self, model: &ConversationModel, event: Option<Event>) {
        let Some(event) = event else { return };
        let note = event.note.as_deref().unwrap_or_default();
        let (name, namespace) = (model.name_any(), model.namespace().unwrap_or_default());
        tracing::info!(%namespace, model = %name, reason = %event.reason, note);
        if let Err(error) = self.recorder.publish(&event, &model.object_ref(&())).await {
            tracing::info!(%namespace, model = %name, %error, "an event was lost");
        }
    }
}
