// Package cloudbridge joins Kubernetes and the fabric: what Kubernetes wants of
// an edge node becomes desired topics, what the node reports becomes Node,
// Lease, Device.status and Pod.status.
//
//	b, err := cloudbridge.New(cloudbridge.Config{Kube: rest, Broker: client.Config{URL: "mqtt://127.0.0.1:1883"}})
//	err = b.Run(ctx)
//
// Everything in it is level-triggered. Informer handlers and the MQTT callback
// only record and enqueue a key. Downwards one worker turns keys into the
// payloads that the topics should have (truth), and a repair.Outbox sends what
// differs from what the broker holds. Upwards the mirror holds what the nodes
// reported last, and a pool of workers brings Kubernetes in line with it.
//
// Nothing is stored: after a restart the truth is computed from Kubernetes
// again, and the numbers that must survive (the revs of wishes) are read back
// from the retained topics or, where the broker lost them, from Device.status.
//
// Locks: truth.mu, mirror.mu and pace.mu are leaves.
package cloudbridge
