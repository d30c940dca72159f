package image

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protowire"
	corev1 "k8s.io/api/core/v1"
)

// A pull says how it is getting on after half a minute, a minute, and so on to
// every ten: over a slow line it takes hours, and each time goes over that line.
const (
	progressFirst = 30 * time.Second
	progressMost  = 10 * time.Minute
)

// progress tells of a pull until ctx ends. The kubelet says nothing meanwhile.
func (m *Images) progress(ctx context.Context, r *request) {
	began := time.Now()
	for wait := m.progressFirst; ; wait = min(2*wait, progressMost) {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
		msg := fmt.Sprintf("Still pulling image %q after %v", r.container.Image, time.Since(began).Truncate(time.Second))
		if m.cfg.Fetching != nil {
			if n, err := m.cfg.Fetching(ctx); err != nil {
				m.log.Debug("the runtime does not tell how far its pulls are", "err", err)
			} else {
				msg += fmt.Sprintf(": %s of the parts that are being fetched have arrived", size(uint64(max(n, 0))))
			}
		}
		if ctx.Err() == nil {
			m.cfg.Event(r.pod, r.container, corev1.EventTypeNormal, "Pulling", msg)
		}
	}
}

// ContainerdFetching is a Config.Fetching for the containerd at a unix socket, by
// its service containerd.services.content.v1.Content. Its Go package would bring
// loggers and ttrpc along; what is needed is one method and one field. It connects
// for each call.
func ContainerdFetching(endpoint string) func(context.Context) (int64, error) {
	return func(ctx context.Context) (sum int64, err error) {
		conn, err := grpc.NewClient("unix://"+strings.TrimPrefix(endpoint, "unix://"), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return 0, err
		}
		defer func() { _ = conn.Close() }()
		ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(ctx, "containerd-namespace", "k8s.io"), 10*time.Second)
		defer cancel()
		var request, response []byte
		if err := conn.Invoke(ctx, "/containerd.services.content.v1.Content/ListStatuses", &request, &response, grpc.ForceCodec(raw{})); err != nil {
			return 0, err
		}
		// ListStatusesResponse{statuses = 1: Status{offset = 4}}
		err = each(response, func(number protowire.Number, status []byte, _ uint64) error {
			if number != 1 {
				return nil
			}
			return each(status, func(number protowire.Number, _ []byte, v uint64) error {
				if number == 4 {
					sum += int64(v)
				}
				return nil
			})
		})
		return sum, err
	}
}

// each calls f with the fields of a message: b of bytes, v of numbers.
func each(message []byte, f func(number protowire.Number, b []byte, v uint64) error) error {
	for len(message) > 0 {
		number, kind, n := protowire.ConsumeTag(message)
		if n < 0 {
			return protowire.ParseError(n)
		}
		message = message[n:]
		var b []byte
		var v uint64
		switch kind {
		case protowire.BytesType:
			b, n = protowire.ConsumeBytes(message)
		case protowire.VarintType:
			v, n = protowire.ConsumeVarint(message)
		default:
			n = protowire.ConsumeFieldValue(number, kind, message)
		}
		if n < 0 {
			return protowire.ParseError(n)
		}
		if err := f(number, b, v); err != nil {
			return err
		}
		message = message[n:]
	}
	return nil
}

// raw is the codec of messages that are encoded already.
type raw struct{}

func (raw) Name() string { return "proto" }

func (raw) Marshal(v any) ([]byte, error) {
	b, ok := v.(*[]byte)
	if !ok {
		return nil, errors.New("not bytes")
	}
	return *b, nil
}

func (raw) Unmarshal(data []byte, v any) error {
	b, ok := v.(*[]byte)
	if !ok {
		return errors.New("not bytes")
	}
	*b = append([]byte(nil), data...)
	return nil
}
