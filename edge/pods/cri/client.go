package cri

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// timeout is for requests that a runtime answers by itself; the stock kubelet's.
	timeout = 2 * time.Minute
	// sandboxTimeout is for making a sandbox, which waits for the network plugins.
	sandboxTimeout = 4 * time.Minute
	// maxMessage bounds what the runtime may answer; the stock kubelet's.
	maxMessage = 16 << 20
)

// Client talks to one runtime. It connects when it is first used and again
// whenever the connection is lost; meanwhile requests fail with an error that
// IsUnavailable knows. Its methods may be called from several goroutines. Each
// has the stock kubelet's time limit besides that of its ctx.
type Client struct {
	log  *slog.Logger
	conn *grpc.ClientConn
	rt   runtimeapi.RuntimeServiceClient
	img  runtimeapi.ImageServiceClient

	eventful atomic.Bool
}

// Dial makes a client of the runtime that listens at endpoint, a unix socket
// such as unix:///run/containerd/containerd.sock or just its path. It does not
// wait for the runtime.
func Dial(endpoint string, log *slog.Logger) (*Client, error) {
	path, err := socket(endpoint)
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient("unix://"+path,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
		// A connect that fails costs nothing on this machine, and pods wait for it.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 500 * time.Millisecond},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithDisableServiceConfig(),
		grpc.WithReadBufferSize(8<<10),
	)
	if err != nil {
		return nil, fmt.Errorf("container runtime %s: %w", endpoint, err)
	}
	return &Client{
		log: log.With("runtime", endpoint), conn: conn,
		rt: runtimeapi.NewRuntimeServiceClient(conn), img: runtimeapi.NewImageServiceClient(conn),
	}, nil
}

// maxSocket is how long the path of a unix socket may be.
const maxSocket = 107

func socket(endpoint string) (string, error) {
	path := endpoint
	if strings.Contains(endpoint, "://") {
		u, err := url.Parse(endpoint)
		if err != nil {
			return "", fmt.Errorf("container runtime %q: %w", endpoint, err)
		}
		if u.Scheme != "unix" || u.Host != "" {
			return "", fmt.Errorf("container runtime %q: want a unix socket, such as unix:///run/containerd/containerd.sock", endpoint)
		}
		path = u.Path
	}
	if !filepath.IsAbs(path) {
		return "", fmt.Errorf("container runtime %q: want an absolute path, such as unix:///run/containerd/containerd.sock", endpoint)
	}
	if len(path) > maxSocket {
		return "", fmt.Errorf("container runtime %q: the path of a unix socket has at most %d bytes, this one %d", endpoint, maxSocket, len(path))
	}
	return path, nil
}

// Close ends the connection. What waits for an answer gets an error.
func (c *Client) Close() error { return c.conn.Close() }

// IsNotFound says whether the runtime does not have what was asked for.
func IsNotFound(err error) bool { return code(err) == codes.NotFound }

// IsDeadline says whether time was up: of a command in a container, or of the
// runtime for its answer.
func IsDeadline(err error) bool {
	return code(err) == codes.DeadlineExceeded || errors.Is(err, context.DeadlineExceeded)
}

// IsUnavailable says whether the runtime is not there or not yet ready, which
// says nothing about what was asked: try again when it is back.
func IsUnavailable(err error) bool {
	// containerd before 2.0 gives the second one no code.
	return code(err) == codes.Unavailable || err != nil && strings.Contains(err.Error(), "server is not initialized yet")
}

// IsUnimplemented says whether the runtime does not know the request.
func IsUnimplemented(err error) bool { return code(err) == codes.Unimplemented }

// code is the error's gRPC code, of wrapped ones too; Unknown for other errors.
func code(err error) codes.Code {
	s, _ := status.FromError(err) // gives Unknown for what is no status
	return s.Code()
}
