//! Connections: accepted, timed out, ended.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};

use super::access::Keys;
use super::app::App;
use super::body::BodyLimits;
use super::router;
use crate::Engine;

/// How a server listens.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// The model's name.
    pub name: String,
    /// Keys that requests must have. Without keys, the server listens only on this machine's own addresses.
    pub keys: Keys,
    /// Limits of a request's body.
    pub body: BodyLimits,
    /// Longest time for a request's head to arrive, and for a connection to stay idle.
    pub head_time: Duration,
    /// Most connections at a time. Others wait to be accepted.
    pub connections: usize,
    /// How long answers may continue after the server was told to stop.
    pub grace: Duration,
}

impl ServerOptions {
    /// The defaults, for a model with this name.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            keys: Keys::from_lines(""),
            body: BodyLimits::default(),
            head_time: Duration::from_secs(30),
            connections: 1024,
            grace: Duration::from_secs(20),
        }
    }
}

/// Why a server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address can be reached from other machines, and there are no keys.
    #[error("{0} can be reached by others, and there is no API key")]
    KeyNeeded(SocketAddr),
    /// The address is in use, or belongs to another machine.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The system's word.
        source: io::Error,
    },
    /// The system refused a thread.
    #[error("cannot start the server: {0}")]
    Start(#[source] io::Error),
    /// The model's `generation_config.json` has a value out of range.
    #[error(transparent)]
    Model(#[from] still_model::ModelError),
}

impl ServeError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::KeyNeeded(_) => Some(
                "write keys, a line each, to a file and add --api-key-file FILE; or listen on 127.0.0.1".into(),
            ),
            Self::Bind { .. } => Some("stop what listens there, or use another --port or --host".into()),
            Self::Start(_) => Some("raise the limit on processes (ulimit -u)".into()),
            Self::Model(error) => error.hint(),
        }
    }
}

/// A listening server.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    app: App,
    options: ServerOptions,
    stop: watch::Sender<bool>,
}

/// Stops a server, from any thread.
#[derive(Clone, Debug)]
pub struct Stopper {
    stop: watch::Sender<bool>,
}

impl Stopper {
    /// Stops the server: it accepts no more connections. Running answers may finish within the grace period of the options.
    pub fn stop(&self) {
        self.stop.send_replace(true);
    }
}

impl Server {
    /// Listens on an address. Port 0 takes a free one. Connections wait until [`Server::run`].
    ///
    /// # Errors
    /// An address that other machines can reach, without keys; an address in use.
    pub fn bind(
        engine: Engine,
        options: ServerOptions,
        address: SocketAddr,
    ) -> Result<Self, ServeError> {
        if options.keys.is_empty() && !address.ip().is_loopback() {
            return Err(ServeError::KeyNeeded(address));
        }
        let listener = TcpListener::bind(address).and_then(|listener| {
            listener.set_nonblocking(true)?;
            Ok(listener)
        });
        let listener = listener.map_err(|source| ServeError::Bind { address, source })?;
        let app = App::new(engine, options.name.clone())?;
        Ok(Self { listener, app, options, stop: watch::Sender::new(false) })
    }

    /// The address that it listens on.
    ///
    /// # Errors
    /// The system's word.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// A handle that stops it.
    pub fn stopper(&self) -> Stopper {
        Stopper { stop: self.stop.clone() }
    }

    /// Serves until it is stopped and all answers have ended.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn run(self) -> Result<(), ServeError> {
        // Handlers tokenize and wait; the engine computes on threads of its own.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("serve")
            .enable_all()
            .build()
            .map_err(ServeError::Start)?;
        let served = runtime.block_on(self.serve());
        runtime.shutdown_timeout(Duration::from_secs(1));
        served.map_err(ServeError::Start)
    }

    async fn serve(self) -> io::Result<()> {
        let Self { listener, app, options, stop } = self;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let router = router(app.clone(), options.keys, options.body);
        let places = Arc::new(Semaphore::new(options.connections));
        let mut stopped = stop.subscribe();
        loop {
            let next = async {
                // Never closed.
                let place = places.clone().acquire_owned().await.ok();
                (place, listener.accept().await)
            };
            let (place, accepted) = tokio::select! {
                next = next => next,
                () = told(&mut stopped) => break,
            };
            match accepted {
                Ok((stream, _)) => {
                    let serve =
                        connection(stream, router.clone(), options.head_time, stop.subscribe());
                    tokio::spawn(async move {
                        serve.await;
                        drop(place);
                    });
                }
                // Too many open files, or the client has gone: neither is a reason to end.
                Err(error) => {
                    tracing::warn!("a connection was not accepted: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
        drop(listener);
        app.begin_to_stop();
        let (engine, grace) = (app.engine().clone(), options.grace);
        let ended = tokio::task::spawn_blocking(move || engine.shutdown(grace)).await;
        if ended.is_err() {
            tracing::error!("the engine did not end as it should");
        }
        // What is left are last pieces on their way.
        let all = places.acquire_many(options.connections.try_into().unwrap_or(u32::MAX));
        let _ = tokio::time::timeout(Duration::from_secs(5), all).await;
        Ok(())
    }
}

async fn connection(
    stream: TcpStream,
    router: Router,
    head_time: Duration,
    mut stop: watch::Receiver<bool>,
) {
    // Pieces are small, and wanted at once.
    let _ = stream.set_nodelay(true);
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head_time)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut served = std::pin::pin!(served);
    let ended = tokio::select! {
        ended = served.as_mut() => ended,
        () = told(&mut stop) => {
            // The answer that is on its way is the connection's last.
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!("a connection ended early: {error}");
    }
}

/// Waits until the server is told to stop.
async fn told(stop: &mut watch::Receiver<bool>) {
    // An error says that the server is gone.
    let _ = stop.wait_for(|stop| *stop).await;
}
