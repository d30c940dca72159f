package cri

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ListImages gives the images of the filter's name; all where it is nil.
func (c *Client) ListImages(ctx context.Context, filter *runtimeapi.ImageFilter) ([]*runtimeapi.Image, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	r, err := c.img.ListImages(ctx, &runtimeapi.ListImagesRequest{Filter: filter})
	return r.GetImages(), err
}

// ImageStatus gives an image by name or ID; nil where it is not present.
func (c *Client) ImageStatus(ctx context.Context, image *runtimeapi.ImageSpec) (*runtimeapi.Image, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	r, err := c.img.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: image})
	if err != nil {
		return nil, err
	}
	if i := r.Image; i != nil && (i.Id == "" || i.Size == 0) {
		return nil, fmt.Errorf("Id or size of image %q is not set", image.GetImage()) //nolint:staticcheck // the stock kubelet's words, seen in events
	}
	return r.Image, nil
}

// PullImage pulls an image, however long it takes, and gives its reference.
func (c *Client) PullImage(ctx context.Context, image *runtimeapi.ImageSpec, auth *runtimeapi.AuthConfig, sandbox *runtimeapi.PodSandboxConfig) (string, error) {
	r, err := c.img.PullImage(ctx, &runtimeapi.PullImageRequest{Image: image, Auth: auth, SandboxConfig: sandbox})
	if s, ok := status.FromError(err); ok && s.Code() == codes.Unknown {
		// Some runtimes begin the text with a reason, such as SignatureValidationFailed.
		return "", errors.New(s.Message())
	}
	if err != nil {
		return "", err
	}
	if r.ImageRef == "" {
		return "", fmt.Errorf("imageRef of image %q is not set", image.GetImage())
	}
	return r.ImageRef, nil
}

// RemoveImage removes an image. One that is gone is no error.
func (c *Client) RemoveImage(ctx context.Context, image *runtimeapi.ImageSpec) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	_, err := c.img.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: image})
	return err
}

// ImageFsInfo says where images and containers lie and what they take.
func (c *Client) ImageFsInfo(ctx context.Context) (*runtimeapi.ImageFsInfoResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return c.img.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
}
