package cri

import (
	"context"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protowire"
)

// containerd tells of changes on the CRI's socket through its service
// containerd.services.events.v1.Events. Its Go packages would bring loggers and
// ttrpc along; what is needed is one method and four fields, read here.

// filters choose the events: of the namespace in which the CRI keeps containers.
var filters = []string{
	`namespace==k8s.io,topic=="/tasks/start"`,
	`namespace==k8s.io,topic=="/tasks/exit"`,
	`namespace==k8s.io,topic=="/containers/delete"`,
}

// containerdEvents subscribes to containerd's own events.
func containerdEvents(ctx context.Context, c *Client) (func() (change, error), error) {
	stream, err := c.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true},
		"/containerd.services.events.v1.Events/Subscribe", grpc.ForceCodec(wire{}))
	if err != nil {
		return nil, err
	}
	var request []byte // SubscribeRequest{filters = 1}
	for _, f := range filters {
		request = protowire.AppendString(protowire.AppendTag(request, 1, protowire.BytesType), f)
	}
	if err := stream.SendMsg(&request); err != nil {
		return nil, err
	}
	if err := stream.CloseSend(); err != nil {
		return nil, err
	}
	return func() (change, error) {
		for {
			var envelope []byte
			if err := stream.RecvMsg(&envelope); err != nil {
				return change{}, err
			}
			ch, ok, err := decode(envelope)
			if err != nil || ok {
				return ch, err
			}
		}
	}, nil
}

// decode reads a containerd.types.Envelope; ok is false where nothing about a
// container has changed, as when a command in it has ended.
func decode(envelope []byte) (ch change, ok bool, err error) {
	e, err := fields(envelope) // topic = 3, event (an Any) = 4
	if err != nil {
		return ch, false, err
	}
	event, err := fields(e[4]) // value = 2
	if err != nil {
		return ch, false, err
	}
	body, err := fields(event[2]) // container_id = 1; of an exit, id = 2
	if err != nil {
		return ch, false, err
	}
	ch.id = string(body[1])
	switch string(e[3]) {
	case "/tasks/start":
		ch.want = started
	case "/tasks/exit":
		if string(body[2]) != ch.id {
			return ch, false, nil // a command's
		}
		ch.want = exited
	case "/containers/delete":
		ch.want = gone
	default:
		return ch, false, nil
	}
	return ch, ch.id != "", nil
}

// fields gives the length-delimited fields of a message by number; of a repeated
// one, the last.
func fields(message []byte) (map[protowire.Number][]byte, error) {
	out := map[protowire.Number][]byte{}
	for len(message) > 0 {
		number, kind, n := protowire.ConsumeTag(message)
		if n < 0 {
			return nil, fmt.Errorf("event of containerd: %w", protowire.ParseError(n))
		}
		message = message[n:]
		if kind == protowire.BytesType {
			var v []byte
			if v, n = protowire.ConsumeBytes(message); n >= 0 {
				out[number] = v
			}
		} else {
			n = protowire.ConsumeFieldValue(number, kind, message)
		}
		if n < 0 {
			return nil, fmt.Errorf("event of containerd: %w", protowire.ParseError(n))
		}
		message = message[n:]
	}
	return out, nil
}

// wire passes messages as they are.
type wire struct{}

func (wire) Name() string { return "proto" }

func (wire) Marshal(v any) ([]byte, error) {
	b, ok := v.(*[]byte)
	if !ok {
		return nil, fmt.Errorf("message of type %T", v)
	}
	return *b, nil
}

func (wire) Unmarshal(data []byte, v any) error {
	b, ok := v.(*[]byte)
	if !ok {
		return fmt.Errorf("message of type %T", v)
	}
	*b = append([]byte(nil), data...) // grpc uses its buffer again
	return nil
}
