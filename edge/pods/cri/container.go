package cri

import (
	"context"
	"errors"
	"fmt"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// CreateContainer makes a container in a sandbox, which must have been made from
// sandboxConfig, and gives its ID.
func (c *Client) CreateContainer(ctx context.Context, sandbox string, config *runtimeapi.ContainerConfig, sandboxConfig *runtimeapi.PodSandboxConfig) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	r, err := c.rt.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: sandbox, Config: config, SandboxConfig: sandboxConfig})
	if err != nil {
		return "", err
	}
	if r.ContainerId == "" {
		return "", errors.New("the runtime gave the new container no ID")
	}
	return r.ContainerId, nil
}

// StartContainer starts a container that was created. None starts twice.
func (c *Client) StartContainer(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	_, err := c.rt.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
	return err
}

// StopContainer sends the container its stop signal, and SIGKILL once grace
// (counted in whole seconds, rounded up) is over. It returns when the container
// has ended. It may be repeated.
func (c *Client) StopContainer(ctx context.Context, id string, grace time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout+grace)
	defer cancel()
	_, err := c.rt.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: seconds(grace)})
	return err
}

// RemoveContainer removes a container, which it kills if need be. One that is
// gone is no error.
func (c *Client) RemoveContainer(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	_, err := c.rt.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id})
	return err
}

// ListContainers gives the containers that match the filter; all where it is nil.
func (c *Client) ListContainers(ctx context.Context, filter *runtimeapi.ContainerFilter) ([]*runtimeapi.Container, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	r, err := c.rt.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: filter})
	return r.GetContainers(), err
}

// ContainerStatus gives a container's state.
func (c *Client) ContainerStatus(ctx context.Context, id string) (*runtimeapi.ContainerStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	r, err := c.rt.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		return nil, err
	}
	if r.Status.GetMetadata() == nil {
		return nil, errors.New("the runtime gave no status of container " + id)
	}
	return r.Status, nil
}

// UpdateContainerResources changes the limits of a container that runs.
func (c *Client) UpdateContainerResources(ctx context.Context, id string, resources *runtimeapi.LinuxContainerResources) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	_, err := c.rt.UpdateContainerResources(ctx, &runtimeapi.UpdateContainerResourcesRequest{ContainerId: id, Linux: resources})
	return err
}

// ExecSync runs a command in a container and waits for it. Where limit, counted in
// whole seconds and rounded up, is over first, the command is killed and the error
// is one that IsDeadline knows; 0 is no limit but that of ctx. A command that
// fails is no error but an exit code.
func (c *Client) ExecSync(ctx context.Context, id string, command []string, limit time.Duration) (*runtimeapi.ExecSyncResponse, error) {
	if limit > 0 {
		// Time for the runtime to clean up.
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout+limit)
		defer cancel()
	}
	r, err := c.rt.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: command, Timeout: seconds(limit)})
	if end, ok := ctx.Deadline(); err != nil && ok && !time.Now().Before(end) && !IsDeadline(err) {
		// The runtime knows of the deadline too, and its answer about that, without
		// a code, may win the race.
		err = fmt.Errorf("%w: %w", context.DeadlineExceeded, err)
	}
	return r, err
}

// ReopenContainerLog makes the runtime write to a new file at the container's log
// path, after the old one was moved away.
func (c *Client) ReopenContainerLog(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	_, err := c.rt.ReopenContainerLog(ctx, &runtimeapi.ReopenContainerLogRequest{ContainerId: id})
	return err
}

// ContainerStats gives the usage of a container that runs.
func (c *Client) ContainerStats(ctx context.Context, id string) (*runtimeapi.ContainerStats, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	r, err := c.rt.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: id})
	return r.GetStats(), err
}

// ListContainerStats gives the usage of the containers that match the filter.
func (c *Client) ListContainerStats(ctx context.Context, filter *runtimeapi.ContainerStatsFilter) ([]*runtimeapi.ContainerStats, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	r, err := c.rt.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{Filter: filter})
	return r.GetStats(), err
}

// seconds rounds up: half a second must not become "no limit".
func seconds(d time.Duration) int64 { return int64((d + time.Second - 1) / time.Second) }
