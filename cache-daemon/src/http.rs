//! Health, metrics and status over HTTP, from the loop's last snapshot; and the inventory feed.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Semaphore;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use crate::inventory::{self, SUBSCRIBERS_MAX, Subscriber};
use crate::listen::PeerEvent;
use crate::metrics::{Metrics, Snapshot};

/// A loop that has not turned for this long is stuck: `/alive` says so.
const HEARTBEAT_MAX: Duration = Duration::from_secs(10);
/// Pause between tries to bind.
const BIND_RETRY: Duration = Duration::from_millis(200);

/// Serves on a thread of its own, which also takes SIGTERM and SIGINT for the loop.
pub fn spawn(
    address: SocketAddr,
    metrics: Arc<Metrics>,
    subscribers: Sender<Subscriber>,
    events: Sender<PeerEvent>,
    notify: impl Fn() + Send + Sync + Clone + 'static,
) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut terminate, mut interrupt) = {
        let _inside = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
    };
    let feed = Feed {
        subscribers,
        places: Arc::new(Semaphore::new(SUBSCRIBERS_MAX)),
        notify: Arc::new(notify.clone()),
    };
    let router =
        router(metrics).merge(Router::new().route("/inventory", get(follow)).with_state(feed));
    let serve = async move {
        tokio::spawn(async move {
            let listener = bind(address).await;
            if let Err(error) = axum::serve(listener, router).await {
                tracing::error!(%error, "http ended");
            }
        });
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if events.send(PeerEvent::Terminate).is_err() {
                return; // The loop has ended.
            }
            notify();
        }
    };
    std::thread::Builder::new().name("http".into()).spawn(move || runtime.block_on(serve))?;
    Ok(())
}

/// A port that is still taken, by a worker just killed, is not the end of the cache.
pub(crate) async fn bind(address: SocketAddr) -> tokio::net::TcpListener {
    let mut told = false;
    loop {
        match tokio::net::TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(error) if !told => {
                told = true;
                tracing::warn!(%address, %error, "cannot bind, trying again");
            }
            Err(_) => {}
        }
        tokio::time::sleep(BIND_RETRY).await;
    }
}

fn router(metrics: Arc<Metrics>) -> Router {
    Router::new()
        .route("/started", get(alive))
        .route("/alive", get(alive))
        .route("/metrics", get(|State(metrics): State<Arc<Metrics>>| async move { metrics.text() }))
        .route("/status", get(status))
        .with_state(metrics)
}

async fn alive(State(metrics): State<Arc<Metrics>>) -> (StatusCode, &'static str) {
    if metrics.snapshot().1.elapsed() < HEARTBEAT_MAX {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the loop has not turned for ten seconds\n")
    }
}

async fn status(State(metrics): State<Arc<Metrics>>) -> Json<Snapshot> {
    Json(metrics.snapshot().0)
}

/// How `/inventory` reaches the loop.
#[derive(Clone)]
struct Feed {
    subscribers: Sender<Subscriber>,
    places: Arc<Semaphore>,
    notify: Arc<dyn Fn() + Send + Sync>,
}

/// Lines of JSON until one side ends it: docs/inventory.md.
async fn follow(State(feed): State<Feed>) -> Response {
    let Ok(place) = feed.places.try_acquire_owned() else {
        let message = format!("{SUBSCRIBERS_MAX} subscribers follow the inventory already\n");
        return (StatusCode::SERVICE_UNAVAILABLE, message).into_response();
    };
    let (subscriber, stream) = inventory::subscribe();
    if feed.subscribers.send(subscriber).is_err() {
        return (StatusCode::SERVICE_UNAVAILABLE, "the worker ends\n").into_response();
    }
    (feed.notify)();
    let lines = ReceiverStream::new(stream.lines).chain(ReceiverStream::new(stream.end));
    // The place is taken until the connection ends.
    let lines = lines.map(move |line| {
        let _taken = &place;
        Ok::<_, std::convert::Infallible>(line)
    });
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}
