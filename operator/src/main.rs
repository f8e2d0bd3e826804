//! The operator's process: parse, connect, lead, run, stop.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::Parser;
use futures::FutureExt;
use kube::Client;
use kube::runtime::events::{Recorder, Reporter};
use operator::config::{Arguments, Config, Election};
use operator::controller::{self, Scope};
use operator::desired::FIELD_MANAGER;
use operator::lease::Elector;
use operator::reconcile::Context;
use operator::telemetry::{Metrics, Readiness, router};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Settings are refused with this exit code, everything else with 70.
const EXIT_CONFIGURATION: u8 = 64;
const EXIT_SOFTWARE: u8 = 70;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .json()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| "info,kube_runtime=warn,kube_client=warn".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print(); // A closed stderr is no reason to fail differently.
            return ExitCode::from(if error.use_stderr() { EXIT_CONFIGURATION } else { 0 });
        }
    };
    let config = match Config::try_from(arguments) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("operator: {error}");
            return ExitCode::from(EXIT_CONFIGURATION);
        }
    };
    let run = tokio::runtime::Runtime::new()
        .context("cannot start the async runtime")
        .and_then(|runtime| runtime.block_on(run(config)));
    match run {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("operator: {error:#}");
            ExitCode::from(EXIT_SOFTWARE)
        }
    }
}

async fn run(config: Config) -> anyhow::Result<()> {
    let stop = stop_on_signal()?;
    let client = Client::try_default().await.context("no way to the API server is configured")?;
    let (metrics, readiness) = (Metrics::new(), Readiness::default());
    let listener = tokio::net::TcpListener::bind(config.http)
        .await
        .with_context(|| format!("cannot listen on {}", config.http))?;
    let http = axum::serve(listener, router(metrics.clone(), readiness.clone()));
    let server = tokio::spawn(http.into_future());

    let scope = Scope(config.watch_namespace);
    let context = Arc::new(Context {
        client: client.clone(),
        images: config.images,
        recorder: Recorder::new(client.clone(), reporter(config.election.as_ref())),
        metrics: metrics.clone(),
    });
    let work = async {
        controller::wait_for_definition(&client, &scope).await;
        readiness.set();
        if let Some(election) = config.election {
            return lead(context, &scope, &election, stop.clone()).await;
        }
        metrics.leader.set(1);
        controller::run(context, &scope, stopped(stop.clone())).await;
        Ok(())
    };
    let outcome = tokio::select! {
        outcome = work => outcome,
        () = stopped_while_waiting(stop.clone(), &metrics) => Ok(()),
    };
    server.abort();
    outcome
}

/// Waits for the lease, works while it holds, gives it back.
async fn lead(
    context: Arc<Context>,
    scope: &Scope,
    election: &Election,
    stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let metrics = context.metrics.clone();
    let identity = election.identity.clone();
    let mut elector = Elector::new(context.client.clone(), &election.namespace, identity);
    tracing::info!(identity = %election.identity, "standing by for the lease");
    elector.acquire().await;
    metrics.leader.set(1);
    tracing::info!(identity = %election.identity, "leading");
    let lost = tokio::select! {
        () = elector.hold() => true,
        () = controller::run(context, scope, stopped(stop)) => false,
    };
    metrics.leader.set(0);
    // A look may still be under way somewhere: a fresh process is simpler than proving it is not.
    anyhow::ensure!(!lost, "the lease was lost; another operator leads, this one starts afresh");
    elector.release().await;
    Ok(())
}

fn reporter(election: Option<&Election>) -> Reporter {
    Reporter {
        controller: FIELD_MANAGER.into(),
        instance: election.map(|election| election.identity.clone()),
    }
}

/// Becomes true at the first SIGTERM or SIGINT.
fn stop_on_signal() -> anyhow::Result<watch::Receiver<bool>> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let (sender, receiver) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        tracing::info!("stopping");
        sender.send_replace(true);
    });
    Ok(receiver)
}

async fn stopped(mut stop: watch::Receiver<bool>) {
    // An error means that the sender is gone, which only happens after it has sent.
    stop.wait_for(|stop| *stop).map(drop).await;
}

/// A standby, or an operator that waits for the definition, has nothing to bring to an end.
async fn stopped_while_waiting(stop: watch::Receiver<bool>, metrics: &Metrics) {
    stopped(stop).await;
    if metrics.leader.get() == 1 {
        std::future::pending::<()>().await;
    }
}
