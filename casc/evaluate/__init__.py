"""COCO's figures of detections: ground truth, matching, AP."""
